# A worker, a driver or the service: the same image everywhere. Built from the root of this repository:
#     docker build -t influence .                                    CPU
#     docker build -t influence --build-arg EXTRA=gpu .              NVIDIA GPUs (CUDA 12)
# pip's own settings say where packages come from: --build-arg PIP_EXTRA_INDEX_URL=… for an index with torch's small CPU build.
FROM python:3.11-slim
ARG EXTRA=cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update && apt-get install -y --no-install-recommends wget procps && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray
WORKDIR /home/ray/influence
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY engine ./engine
COPY actors ./actors
COPY storage ./storage
COPY launch ./launch
COPY configs ./configs
RUN pip install --no-cache-dir -c constraints.txt torch \
    && pip install --no-cache-dir -c constraints.txt -e ".[$EXTRA,lora]" \
    && chown -R ray:ray /home/ray
USER ray
# Ray asks for its token unless told otherwise; no usage statistics leave the cluster
ENV RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
EXPOSE 6379 8000 8080 8265 10001
CMD ["python", "launch/score.py", "--help"]
