# docker build --build-arg EXTRA=onnx -t clip-microservice .
# docker run -p 51000-51002:51000-51002 -v clip-models:/models clip-microservice
# docker run -e CLIP_MODEL=ViT-B-32::openai ... clip-microservice my-flow.yml
#
# EXTRA is a runtime's; its flow is the default one. onnx-gpu needs a BASE with CUDA:
# docs/gpu.md.
ARG BASE=python:3.12-slim
FROM ${BASE} AS python
# NVIDIA's images come without Python. Its headers and g++ are for pycuda.
RUN command -v python3 > /dev/null || { apt-get update \
    && apt-get install -y --no-install-recommends python3-venv python3-dev g++ \
    && rm -rf /var/lib/apt/lists/*; }

FROM python AS build
ARG EXTRA=onnx
WORKDIR /src
COPY . .
RUN python3 -m venv /venv \
    && /venv/bin/pip install --no-cache-dir -c requirements.lock ./clip_client ".[${EXTRA}]" \
    && cp "flows/${EXTRA%%[-,]*}-flow.yml" /flow.yml

FROM python
COPY --from=build /venv /venv
COPY --from=build /flow.yml /flow.yml
# Whatever user runs it, all that is downloaded or cached goes to /models.
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 HOME=/models HF_HOME=/models CLIP_MODEL=embedded
RUN useradd --home-dir /models clip && mkdir -p /models && chmod 1777 /models
USER clip
VOLUME /models
EXPOSE 51000 51001 51002
# A proxy of the environment is not asked for this machine.
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request as u; \
    u.build_opener(u.ProxyHandler({})).open('http://127.0.0.1:51001/readyz')"]
ENTRYPOINT ["python", "-m", "clip_server"]
CMD ["/flow.yml"]
