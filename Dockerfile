# The image of every node: Ray's own, with what pyproject.toml asks for, and our code.
#   docker build -t REGISTRY/antidote:0.1.0 . && docker push REGISTRY/antidote:0.1.0
# Then name it in cluster.yaml (docker.image) or deploy/kuberay.yaml. torch comes with its CUDA libraries; the node brings the driver.
FROM rayproject/ray:2.60.0-py311

ENV RAY_AUTH_MODE=token \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /home/ray/antidote

# The slow layer first: it is made again only when the pins change.
COPY --chown=ray:users pyproject.toml deploy/setup.sh ./
RUN bash setup.sh && rm -rf ~/.cache/pip

COPY --chown=ray:users README.md LICENSE ./
COPY --chown=ray:users attacks attacks
COPY --chown=ray:users defenses defenses
COPY --chown=ray:users models models
COPY --chown=ray:users orchestrate orchestrate
RUN python -m pip install --no-cache-dir --no-deps --editable . && antidote ls >/dev/null

USER 1000
CMD ["antidote", "--help"]
