# docker build -t spo_fast .  then  docker run --gpus all -v "$PWD/runs:/runs" spo_fast train --model sdxl --output_dir /runs/sdxl
# The CUDA kernels are compiled in the first stage; the second has CUDA's runtime alone. CUDA 13 needs driver 580 or later.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS build
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev build-essential \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/spo_fast
ENV PATH=/opt/spo_fast/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
# torch by itself first: it changes least, and is the largest layer
RUN pip install --no-cache-dir -c constraints.txt "$(grep '^torch==' constraints.txt)"
COPY . .
RUN SPO_FAST_BUILD_CUDA=1 pip install --no-cache-dir -c constraints.txt '.[cuda,data,prodigy,schedulefree]'

FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04
# python3-dev and gcc: Triton compiles its launchers when it is first used
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/spo_fast /opt/spo_fast
ENV PATH=/opt/spo_fast/bin:$PATH HF_HOME=/runs/huggingface
WORKDIR /runs
ENTRYPOINT ["spo-fast"]
CMD ["--help"]
