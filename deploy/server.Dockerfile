# Steersman with its engine. Built by compose.yaml; the model and the store are mounted.
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git libnuma1 make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /steersman
COPY Makefile README.md pyproject.toml ./
COPY constraints constraints
COPY src src
COPY server server
COPY steering steering
COPY kernels kernels
COPY clients clients

# cpu or cuda; TORCH_INDEX is PyTorch's index of CPU wheels, where pip is not configured to find one already.
ARG ENGINE=cpu
ARG TORCH_INDEX=
RUN make install ENGINE=${ENGINE} TORCH_INDEX=${TORCH_INDEX} && rm -rf /root/.cache/pip

EXPOSE 8000
ENTRYPOINT ["/steersman/.venv/bin/steersman", "serve"]
