# The gate on vLLM's own image: what is judged is what serves.
#
#   docker build --tag quantgate .
#   docker run --gpus all --volume "$PWD:/project" quantgate gate PATH_OR_ID --base PATH_OR_ID
#
# --build-arg VLLM=v0.26.0 takes another release; pyproject.toml says which are supported.
ARG VLLM=v0.32.0
FROM vllm/vllm-openai:${VLLM}
COPY pyproject.toml README.md LICENSE /opt/quantgate/
COPY src /opt/quantgate/src
COPY suites /opt/quantgate/suites
COPY fixtures/probes /opt/quantgate/fixtures/probes
# The image has a vLLM that the extra accepts, so pip installs no other.
RUN python3 -m pip install --no-cache-dir "/opt/quantgate[gpu]"
WORKDIR /project
ENTRYPOINT ["quantgate"]
CMD ["doctor"]
