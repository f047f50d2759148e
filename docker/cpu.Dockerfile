# quest-deploy for CPUs: every stage, OpenVINO and onnxruntime.
#
#   docker build -f docker/cpu.Dockerfile -t quest-deploy .
#   docker run --rm -v "$PWD/quest-out:/work/quest-out" quest-deploy run --model emoji --bits w4a4
FROM python:3.11-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:3.11-slim-bookworm
COPY constraints.txt /tmp/
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu \
    "$(echo /dist/*.whl)[torch,onnxruntime,openvino,serving]"
RUN useradd --create-home --uid 1000 quest && mkdir /work && chown quest /work
USER 1000
WORKDIR /work
ENTRYPOINT ["quest-deploy"]
CMD ["--help"]
