"""Writes a model as a model repository of Triton."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import onnx

from clip_server.convert.triton import config
from clip_server.convert.triton.config import AUTO, BOOL, CPU, FP32, GPU, STRING, Backend, Fields
from clip_server.errors import ConfigurationError
from clip_server.model_card import ModelCard
from clip_server.models import tokenizer_files
from clip_server.models.converted import CARD, TOWERS, Tower
from clip_server.runtimes.samples import samples

# Of a request, and of the batches that Triton forms.
MAX_BATCH_SIZE = 64
_PREFERRED_BATCH_SIZES = (8, 16, 32, 64)
# The length of texts that engines are fastest at.
_USUAL_TEXT = 16
_TOWER_MODELS: Mapping[Tower, str] = {"text": "clip_textual", "image": "clip_visual"}
_GRAPH, _ENGINE = "model.onnx", "model.plan"
# What preprocessing needs of this package, and of others.
_CARRIED = ("__init__.py", "errors.py", "install.py", "model_card.py", "preprocess")
_REQUIREMENTS = ("numpy", "pillow", "tokenizers", "ftfy")
_BUILD_ENGINES = "build_engines.sh"


@dataclass(frozen=True)
class Repository:
    """A model repository, and how Triton is to run what is in it.

    folder: where it is written.
    backend: of the towers.
    version: the folder of each model that is written; Triton serves the highest.
    gpus: numbers of those that run the towers; empty: every GPU that Triton sees, or the CPU.
    prompts: of `zero_shot`, where a request brings none.
    """

    folder: Path
    backend: Backend = "onnxruntime"
    version: int = 1
    gpus: Sequence[int] = ()
    prompts: Sequence[str] = ()

    def graph(self, tower: Tower) -> Path:
        """The file for a tower's ONNX graph, which has to be written before `write`."""
        return self.folder / _TOWER_MODELS[tower] / str(self.version) / _GRAPH

    def check(self, card: ModelCard) -> None:
        """Raises ConfigurationError where the folder holds versions of a model that differs."""
        for held in self.folder.glob(f"clip_text/*/{CARD}"):
            text, shape = json.loads(held.read_text("utf-8")), _shape(asdict(card))
            if held.parent.name != str(self.version) and _shape(text) != shape:
                raise ConfigurationError(
                    f"{held.parent} is of {text['name']}, whose dimensions differ from those of "
                    f"{card.name}: choose another folder"
                )

    def write(self, card: ModelCard, precision: str) -> None:
        """Writes every model around the towers' graphs."""
        facts = self._facts(card, precision)
        # Reading a graph reads its weights too.
        graphs = {tower: _tensors(self.graph(tower)) for tower in TOWERS}
        for tower, (source, target) in graphs.items():
            self._write_preprocessing(tower, card, source)
            self._write_tower(tower, card, source, target)
            self._write_ensemble(tower, card, facts, source, target)
        self._write_zero_shot(facts)
        runs_towers = ("onnxruntime",) if self.backend == "python" else ()
        requirements = "".join(f"{name}\n" for name in (*_REQUIREMENTS, *runs_towers))
        (self.folder / "requirements.txt").write_text(requirements, "utf-8")
        if self.backend == "tensorrt":
            names = {tower: source["name"] for tower, (source, _) in graphs.items()}
            self._write_engine_script(card, names)

    def instructions(self) -> str:
        """The commands that serve the repository, for a person."""
        built = f"\n    sh /models/{_BUILD_ENGINES}    # in the container: builds the engines"
        return _INSTRUCTIONS.format(
            folder=self.folder.resolve(), engines=built if self.backend == "tensorrt" else ""
        )

    def _version(self, model: str) -> Path:
        folder = self.folder / model / str(self.version)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _write_config(self, name: str, fields: Fields) -> None:
        # An ensemble's version has no file, and tools that copy folders leave empty ones out.
        (self._version(name) / ".keep").touch()
        text = config.to_text({"name": name, **fields})
        (self.folder / name / "config.pbtxt").write_text(text, "utf-8")

    def _write_preprocessing(self, kind: Tower, card: ModelCard, tower_input: Fields) -> None:
        name = f"clip_{kind}"
        version = self._version(name)
        _copy_source("clip_preprocessing", version / "clip_preprocessing.py")
        _copy_source(kind, version / "model.py")
        _carry_package(version.parent)
        (version / CARD).write_text(json.dumps(asdict(card), indent=2) + "\n", "utf-8")
        if kind == "text":
            for file in tokenizer_files.files(card.text):
                shutil.copyfile(file, version / file.name)
        target = {**tower_input, "name": _CONTENT[kind]}
        fields = {
            "backend": "python",
            "max_batch_size": MAX_BATCH_SIZE,
            "input": [_item(kind)],
            "output": [target, *_EXTRA_OUTPUTS[kind]],
            "instance_group": [{"count": 1, "kind": CPU}],
            "dynamic_batching": config.dynamic_batching(_PREFERRED_BATCH_SIZES),
        }
        self._write_config(name, fields)

    def _write_tower(self, tower: Tower, card: ModelCard, source: Fields, target: Fields) -> None:
        name = _TOWER_MODELS[tower]
        if self.backend == "python":
            _copy_source("tower", self._version(name) / "model.py")
        fields = {
            "backend": self.backend,
            "max_batch_size": MAX_BATCH_SIZE,
            "input": [source],
            "output": [target],
            "instance_group": [self._instances()],
            "dynamic_batching": config.dynamic_batching(_PREFERRED_BATCH_SIZES),
            "model_warmup": self._write_warm_up(tower, source, card),
        }
        self._write_config(name, fields)

    def _write_warm_up(self, tower: Tower, source: Fields, card: ModelCard) -> list[Fields]:
        """Writes an input for the first requests, which Triton sends itself: alone, and in a batch.
        A text has to have its end, so zeros would not do."""
        item = samples(card, tower)[-1]
        folder = self.folder / _TOWER_MODELS[tower] / "warmup"
        folder.mkdir(exist_ok=True)
        (folder / source["name"]).write_bytes(item.tobytes())
        value = {
            "data_type": source["data_type"],
            "dims": list(item.shape),
            "input_data_file": source["name"],
        }
        return [
            {
                "name": f"a batch of {size}",
                "batch_size": size,
                "inputs": [{"key": source["name"], "value": value}],
            }
            for size in (1, _PREFERRED_BATCH_SIZES[0])
        ]

    def _instances(self) -> Fields:
        if self.gpus:
            return {"count": 1, "kind": GPU, "gpus": list(self.gpus)}
        # Of Triton's python backend KIND_AUTO is the CPU.
        return {"count": 1, "kind": AUTO}

    def _write_ensemble(
        self,
        kind: Tower,
        card: ModelCard,
        facts: Mapping[str, object],
        tower_input: Fields,
        tower_output: Fields,
    ) -> None:
        item, content, extra = _item(kind), _CONTENT[kind], _EXTRA_OUTPUTS[kind]
        outputs = {name: name for name in (content, *(each["name"] for each in extra))}
        steps = config.ensemble_steps(
            (f"clip_{kind}", {item["name"]: item["name"]}, outputs),
            (
                _TOWER_MODELS[kind],
                {tower_input["name"]: content},
                {tower_output["name"]: "EMBEDDING"},
            ),
        )
        fields = {
            "platform": "ensemble",
            "max_batch_size": MAX_BATCH_SIZE,
            "input": [item],
            "output": [config.tensor("EMBEDDING", FP32, card.dim), *extra],
            "ensemble_scheduling": {"step": steps},
            "parameters": config.parameters(facts),
        }
        self._write_config(f"{kind}_embedding", fields)

    def _write_zero_shot(self, facts: Mapping[str, object]) -> None:
        _copy_source("zero_shot", self._version("zero_shot") / "model.py")
        labels = {"label_filename": "labels.txt"} if self.prompts else {}
        if self.prompts:
            lines = "".join(f"{prompt}\n" for prompt in self.prompts)
            (self.folder / "zero_shot" / "labels.txt").write_text(lines, "utf-8")
        prompts = json.dumps(list(self.prompts), ensure_ascii=False)
        fields = {
            "backend": "python",
            "max_batch_size": 0,
            "input": [
                _item("image"),
                config.tensor("TEXTS", STRING, -1, optional=True),
            ],
            "output": [
                config.tensor("LOGITS", FP32, -1),
                config.tensor("PROBABILITIES", FP32, -1, **labels),
            ],
            "instance_group": [{"count": 1, "kind": CPU}],
            "parameters": config.parameters({**facts, "prompts": prompts}),
        }
        self._write_config("zero_shot", fields)

    def _facts(self, card: ModelCard, precision: str) -> Mapping[str, object]:
        """Facts about the model, for clients."""
        bias = {} if card.logit_bias is None else {"logit_bias": card.logit_bias}
        return {
            "model": card.name,
            "precision": precision,
            "towers": self.backend,
            "logit_scale": card.logit_scale,
            **bias,
            "context_length": card.text.context_length,
            "image_size": card.image.size,
            "max_batch_size": MAX_BATCH_SIZE,
        }

    def _write_engine_script(self, card: ModelCard, inputs: Mapping[Tower, str]) -> None:
        """An engine runs only with the TensorRT and on the kind of GPU that built it: those of
        the machine, and of the container, in which Triton will run."""
        side, context = card.image.size, card.text.context_length
        image = [(batch, 3, side, side) for batch in (1, _PREFERRED_BATCH_SIZES[0], MAX_BATCH_SIZE)]
        lengths = (1, min(_USUAL_TEXT, context), context)
        if card.text.trim == "fixed":
            lengths = (context,) * 3
        text = [(shape[0], length) for shape, length in zip(image, lengths, strict=True)]
        commands = [
            self._engine_command("image", inputs["image"], image),
            self._engine_command("text", inputs["text"], text),
        ]
        script = self.folder / _BUILD_ENGINES
        script.write_text("\n".join([_SCRIPT_HEAD, *commands, ""]), "utf-8")
        script.chmod(0o755)

    def _engine_command(self, tower: Tower, name: str, shapes: Sequence[Sequence[int]]) -> str:
        folder = f"{_TOWER_MODELS[tower]}/{self.version}"
        options = [
            f"--{which}Shapes={name}:{'x'.join(map(str, shape))}"
            for which, shape in zip(("min", "opt", "max"), shapes, strict=True)
        ]
        files = f"--onnx={folder}/{_GRAPH} --saveEngine={folder}/{_ENGINE}"
        return f'"$trtexec" {files} --stronglyTyped {" ".join(options)}'


# Between preprocessing and a tower.
_CONTENT: Mapping[Tower, str] = {"text": "TOKENS", "image": "PIXELS"}
# Outputs of preprocessing for clients, besides the input of the tower.
_EXTRA_OUTPUTS: Mapping[Tower, Sequence[Fields]] = {
    "text": [config.tensor("TRUNCATED", BOOL, 1)],
    "image": [],
}
_INSTRUCTIONS = """
In a container of Triton, with {folder} mounted at /models:

    pip install -r /models/requirements.txt{engines}
    tritonserver --model-repository /models

and in an application: Client("triton://host:8000") or Client("triton+grpc://host:8001")
"""
_SCRIPT_HEAD = """#!/bin/sh
# Builds the towers' engines. Run it in Triton's container, on the GPU that will serve them.
set -e
cd "$(dirname "$0")"
trtexec=$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)"""


def _item(kind: Tower) -> Fields:
    """A text or an image, as a client sends it."""
    return config.tensor(kind.upper(), STRING, 1)


def _tensors(graph: Path) -> tuple[Fields, Fields]:
    """The input and the output of a tower's graph, without the axis of the batch."""
    model = onnx.load(graph, load_external_data=False).graph
    source, target = (_tensor(*values) for values in (model.input, model.output))
    return source, target


def _tensor(value: onnx.ValueInfoProto) -> Fields:
    of = value.type.tensor_type
    kind = config.Enum(f"TYPE_{_TYPES[of.elem_type]}")
    # A dynamic axis has no value.
    return config.tensor(value.name, kind, *(axis.dim_value or -1 for axis in of.shape.dim[1:]))


_TYPES = {
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.FLOAT16: "FP16",
}


def _shape(card: Mapping[str, object]) -> object:
    """The dimensions that all versions of a model share."""
    text, image = card["text"], card["image"]
    assert isinstance(text, dict)
    assert isinstance(image, dict)
    return card["dim"], image["size"], text["trim"] == "fixed" and text["context_length"]


def _copy_source(name: str, target: Path) -> None:
    source = resources.files("clip_server.convert.triton") / "models" / f"{name}.py"
    target.write_text(source.read_text("utf-8"), "utf-8")


def _carry_package(model: Path) -> None:
    """Copies the code that preprocessing runs into a model's folder, where it is imported."""
    source = Path(str(resources.files("clip_server")))
    for name in _CARRIED:
        target = model / "clip_server" / name
        if (source / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source / name, target, dirs_exist_ok=True, ignore=ignored)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target)
