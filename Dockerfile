# docker build --build-arg EXTRA=onnx -t clip-microservice .        (onnx, onnx-gpu, torch)
# docker run -p 51000-51002:51000-51002 -v clip-models:/models clip-microservice
# docker run -e CLIP_MODEL=ViT-B-32::openai ... clip-microservice torch-flow.yml
FROM python:3.12-slim AS build
ARG EXTRA=onnx
WORKDIR /src
COPY . .
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir -c requirements.lock ./clip_client ".[${EXTRA}]"

FROM python:3.12-slim
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/models CLIP_MODEL=embedded
RUN useradd --create-home clip && mkdir /models && chown clip /models
USER clip
VOLUME /models
EXPOSE 51000 51001 51002
HEALTHCHECK --start-period=120s CMD \
    ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:51001/readyz')"]
ENTRYPOINT ["python", "-m", "clip_server"]
CMD ["onnx-flow.yml"]
