# Graft in a container.
#
#   docker build -t graft:cuda .                         NVIDIA: torch's own wheels bring CUDA
#   docker build -t graft --build-arg TORCH_INDEX=URL .  CPU: URL is the index of torch's CPU wheels,
#                                                        which pytorch.org/get-started names
#   docker run --rm -v "$PWD:/workspace" -v graft-cache:/home/graft/.cache graft doctor
#   docker run --rm --gpus all -v "$PWD:/workspace" graft:cuda experiment=smoke task.path=rows.jsonl
#
# Run folders go to /workspace/runs. With another user id: --build-arg UID=$(id -u).
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=
ARG UID=1000

# A C compiler for the sparse gradient of RoSA and SpIEL, and for torch.compile; git for the
# revision that a run records.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/graft
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY adapters adapters
COPY conf conf
COPY tasks tasks
COPY trainer trainer

# torch first: its wheels for the CPU are on an index of their own.
RUN pip install --no-cache-dir --constraint constraints.txt \
        ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
    && pip install --no-cache-dir --constraint constraints.txt ".[tensorboard,schedulefree]"

RUN useradd --create-home --uid "$UID" graft && mkdir /workspace && chown graft /workspace
USER graft
WORKDIR /workspace
VOLUME ["/home/graft/.cache"]
ENTRYPOINT ["graft"]
CMD ["--help"]
