"""CLIP as a microservice: texts and images to vectors."""

import os
from importlib.metadata import version

__version__ = version("clip-server")

# No dependency calls home or keeps records of its use. They read these when they are imported,
# which happens after this package's import, in every command and in every process.
os.environ |= {
    "ORT_DISABLE_TELEMETRY": "1",
    "JINA_OPTOUT_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
