#!/bin/sh
# Two replicas of a model on this machine behind vllm-router (pip install vllm-router), as one OpenAI address.
#
#   deploy/two_replicas.sh MODEL [PORT]
#
# The router asks every replica's /health, sends requests to healthy ones alone, and tries again elsewhere what a replica
# could not begin. A stream that breaks off is not tried again: the client has read part of it.
set -eu
model=${1:?usage: two_replicas.sh MODEL [PORT]}
port=${2:-8000}
trap 'kill $first $second 2>/dev/null || true; wait' EXIT INT TERM
mor serve "$model" --port $((port + 1)) &
first=$!
mor serve "$model" --port $((port + 2)) &
second=$!
vllm-router --port "$port" \
  --worker-urls "http://127.0.0.1:$((port + 1))" "http://127.0.0.1:$((port + 2))" \
  --policy power_of_two --health-check-endpoint /health \
  --health-check-interval-secs 2 --health-failure-threshold 1 --health-success-threshold 1 \
  --retry-max-retries 3
