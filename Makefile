# make serve   sets up what is missing, builds, serves the default model on :8000
# make test    the same set-up, CUDA's compiler, clients in Python and JavaScript, a browser, chat templates and their cases, schemas, and a stub of S3,
#              then runs every test, and every bench in its short form
# make check   formatting, lints, documentation
# make docs    the book in target/book/html, with all links checked
# make bench   measures the engine's host cost per step, the cache's bookkeeping and the CPU kernels
# make bench-short   runs every bench once, in its short form
# make compare PROMPTS=FILE.jsonl   measures llama-server and this server in turn, for an hour or more; ARGS=... goes to benches/compare
# make schemathesis   tests with thousands of requests generated from /openapi.json, for ten minutes at most; ARGS=... goes to scripts/schemathesis
# make llama-server-suite   runs llama-server's own test suite against this server, for seven minutes; ARGS=... goes to scripts/llama-server-suite
# make agents  runs sessions of Codex and Qwen Code against this server, for a few minutes; installs 480 MB once
# make fleet   runs three replicas behind HAProxy, smg and Envoy as deploy/ configures them, and a model on workers, for some minutes; installs 330 MB once; ARGS=... goes to scripts/fleet
# make lm-eval compares an evaluator's log likelihoods with `medusa-llama perplexity`; installs 750 MB once
# make deny    checks licences and duplicate dependencies; installs cargo-deny once
# make gpu     packs a CUDA build with its tests and benches for a host with a GPU
# make chat-cases   takes the cases of llama.cpp's test of chat templates out of it, for tests/chat_cases.rs
# Steps of the set-up, each idempotent: make tools, make vendor, make model, make clients, make node-clients, make browser, make templates, make schemas, make s3 (for tests); for CUDA make nvcc, make cuda.

.PHONY: serve test check docs bench bench-short compare schemathesis llama-server-suite agents lm-eval chat-cases build gpu setup tools vendor model clients node-clients browser templates schemas s3 nvcc cuda fleet deny help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

tools vendor model clients node-clients browser templates schemas s3 nvcc cuda:
	@scripts/setup $@

setup:
	@scripts/setup

build: setup
	cargo build --release --locked

serve: build
	./target/release/medusa-llama serve

test: setup clients node-clients browser templates schemas s3 check chat-cases
	cargo test --release --locked
	$(MAKE) bench-short

check: tools vendor nvcc docs
	scripts/check-imports
	cargo fmt --check
	cargo clippy --release --locked --all-targets -- -D warnings
	cargo clippy --release --locked --all-targets --features cuda-kernels -- -D warnings
	scripts/check-kernels
	RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --no-deps

docs:
	@scripts/setup docs
	scripts/book

bench: setup
	cargo bench --locked

# Each bench once, to see that it runs (benches/kernels.rs needs a GPU: `make check` compiles it).
bench-short: build
	cargo bench --locked -- --test
	benches/compare --help >/dev/null
	benches/soak.py --requests 40 --parallel 4 >/dev/null
	benches/stall.py --streams 2 --prompt-tokens 200 --runs 1
	benches/neighbours --streams 1 --busy 1 --rounds 1 --seconds 1
	benches/structured.py --rounds 1 --seeds 1
	benches/same-text.py --seeds 2 -n 16

compare: build
	@test -n "$(PROMPTS)" || { echo 'make compare needs PROMPTS=FILE.jsonl: a line is like {"prompt": "...", "category": "..."}' >&2; exit 1; }
	benches/compare --prompts "$(PROMPTS)" $(ARGS)

schemathesis: build
	@scripts/setup schemathesis
	timeout 600 scripts/schemathesis $(ARGS)

llama-server-suite: build
	scripts/llama-server-suite $(ARGS)

agents: build
	scripts/agents

chat-cases: build
	scripts/chat-cases

fleet: build
	@scripts/setup fleet s3
	scripts/fleet $(ARGS)

lm-eval: build
	@scripts/setup lm-eval
	scripts/lm-eval $(ARGS)

gpu: setup cuda
	scripts/gpu-bundle

deny:
	@command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	cargo deny --locked check licenses bans sources
