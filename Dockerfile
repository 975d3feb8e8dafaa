# apr-ray with all it needs to train and to run; see docs/running.md.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
# Where torch comes from besides PyPI: its CPU build. For CUDA: --build-arg TORCH_INDEX=https://pypi.org/simple
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /src
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
# First what the package needs, from its own list, so that a change of code leaves this layer as it is.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --extra-index-url "${TORCH_INDEX}" -c constraints.txt torch numpy setuptools wheel \
    && python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    > requirements.txt \
    && pip install --extra-index-url "${TORCH_INDEX}" -c constraints.txt -r requirements.txt
COPY README.md LICENSE NOTICE ./
COPY apr_ray apr_ray
RUN pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:${PYTHON}-slim-bookworm
RUN useradd --uid 1000 --create-home apr && install -d -o apr /work
COPY --from=build /venv /venv
# One OpenMP thread a process: with more, every engine collapses as soon as anything else wants a core.
# A home for any user (docker run --user): Ray writes its token there, and an unknown user's home would be /.
RUN install -d -m 1777 /home/anyone
ENV PATH=/venv/bin:$PATH OMP_NUM_THREADS=1 HOME=/home/anyone
USER 1000
# Runs are written here: mount a folder that this user may write.
WORKDIR /work
ENTRYPOINT ["apr-ray"]
CMD ["--help"]
