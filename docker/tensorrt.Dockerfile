# quest-deploy with TensorRT and our plugins, on NVIDIA's container. An engine runs with the
# TensorRT that built it: build engines with the image of the release that you serve with.
#
#   docker build -f docker/tensorrt.Dockerfile -t quest-deploy:tensorrt .
#   docker run --rm --gpus all -v "$PWD/quest-out:/work/quest-out" quest-deploy:tensorrt \
#       build-engine --backend tensorrt -w quest-out/emoji-w4a4
ARG RELEASE=25.06-py3
FROM nvcr.io/nvidia/tensorrt:${RELEASE}
WORKDIR /opt/quest-deploy
COPY trt_plugins trt_plugins
RUN python3 -m pip install --no-cache-dir --target /opt/headers nlohmann-json==3.12.0 \
    && cmake -S trt_plugins -B trt_plugins/build -DCMAKE_INSTALL_PREFIX=/usr/local \
        -DNLOHMANN_JSON_INCLUDE_DIR=/opt/headers/nlohmann_json/include \
    && cmake --build trt_plugins/build --parallel \
    && cmake --install trt_plugins/build
ENV QUEST_DEPLOY_PLUGINS=/opt/quest-deploy/trt_plugins/build/libquest_trt_plugins.so
COPY . .
# The container's own TensorRT, so not the extra gpu, which would install another. ".[torch]" is no package that has a version
# to pin.
# hadolint ignore=DL3013
RUN python3 -m pip install --no-cache-dir "polygraphy>=0.53" ".[torch]"
WORKDIR /work
ENTRYPOINT ["quest-deploy"]
CMD ["doctor"]
