# make serve   set up what is missing, build, serve the default model on :8000
# make test    the same set-up, then every test
# make check   formatting, lints, documentation
# make bench   the engine's host cost per step
# Steps of the set-up, each idempotent: make tools, make vendor, make model.

.PHONY: serve test check bench build setup tools vendor model deny help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

tools vendor model:
	@scripts/setup $@

setup:
	@scripts/setup

build: setup
	cargo build --release --locked

serve: build
	./target/release/medusa-llama serve

test: setup check
	cargo test --release --locked

check: tools vendor
	cargo fmt --check
	cargo clippy --release --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --no-deps

bench: setup
	cargo bench --locked

# Licences and duplicate dependencies; installs cargo-deny once.
deny:
	@command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	cargo deny --locked check licenses bans sources
