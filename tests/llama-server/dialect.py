"""llama-server's requests and answers in terms of ours: routes and fields by other names.

Nothing here decides what an answer says. What our server does not report is not in the answer either,
and a field that it does not know is sent on, for it to refuse.
"""
import json

COMPLETION = ("/completion", "/completions")
CHAT = "/v1/chat/completions"
OPENAI = (CHAT, "/v1/completions")
COUNT = "/chat/completions/input_tokens"
# Routes that differ in their path only.
PATHS = {"/chat/completions": CHAT, "/models": "/v1/models"}

# `type` of an error, from our `code` (OpenAI's dialect) or `type` (/generate).
ERROR_TYPES = {
    "invalid_api_key": "authentication_error",
    "context_length_exceeded": "exceed_context_size_error",
    "not_found": "not_found_error",
}

# llama-server's metrics: kind, and ours whose sum it is; a minus subtracts.
METRICS = {
    # Ours counts cached tokens, too.
    "prompt_tokens_total": ("counter", "prompt_tokens_total", "-prefix_cache_hits_total"),
    "prompt_tokens_cached_total": ("counter", "prefix_cache_hits_total"),
    "prompt_seconds_total": ("counter", "request_prefill_time_seconds_sum"),
    "tokens_predicted_total": ("counter", "generation_tokens_total"),
    "tokens_predicted_seconds_total": ("counter", "request_decode_time_seconds_sum"),
    "n_decode_total": ("counter", "steps_total"),
    "spec_decode_num_draft_tokens_total": ("counter", "spec_decode_num_draft_tokens_total"),
    "spec_decode_num_accepted_tokens_total": ("counter", "spec_decode_num_accepted_tokens_total"),
    "spec_decode_num_drafts_total": ("counter", "spec_decode_num_drafts_total"),
    "requests_processing": ("gauge", "num_requests_running"),
    "requests_deferred": ("gauge", "num_requests_waiting"),
}


class Completion:
    """A request of llama-server's `/completion`: ours to send for it, and its answers in return."""

    def __init__(self, body, defaults):
        body = with_defaults(body, defaults)
        prompt = body.pop("prompt", None)
        self.is_list = isinstance(prompt, list) and all(isinstance(part, (str, list, dict)) for part in prompt)
        self.shows_tokens = bool(body.pop("return_tokens", False)) or bool(body.get("stream"))
        self.max_tokens = body.pop("n_predict", None)
        if self.max_tokens == -1:
            self.max_tokens = defaults["n_ctx"]
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        self.text = "" # of a stream so far
        self.n_probs = body.pop("n_probs", 0)
        if self.n_probs:
            body["logprobs"] = self.n_probs
        if body.get("seed") == -1:
            del body["seed"]
        self.bodies = [{**body, **prompt_fields(one), "raw": True, "details": True} for one in (prompt if self.is_list else [prompt])]

    def answer(self, ours, index=0):
        return {**self.piece(ours, index, self.shows_tokens), **self.end(ours, ours["generated_text"])}

    def event(self, ours):
        if "error" in ours:
            return ours
        self.text += ours["generated_text"]
        piece = self.piece(ours, 0, True)
        return {**piece, **self.end(ours, self.text)} if "finish_reason" in ours else {**piece, "stop": False}

    def piece(self, ours, index, shows_tokens):
        tokens = ours.get("tokens", [])
        theirs = {"index": index, "content": ours["generated_text"], "tokens": [t["id"] for t in tokens] if shows_tokens else []}
        if self.n_probs:
            theirs["completion_probabilities"] = [{**probability(t), "top_logprobs": list(map(probability, t["top_logprobs"]))} for t in tokens]
        return theirs

    def end(self, ours, text):
        usage, timings = ours["usage"], ours["timings"]
        reason = ours.get("stop_reason")
        is_cut = ours["finish_reason"] == "length"
        return {
            "stop": True,
            "stop_type": "limit" if is_cut else "word" if isinstance(reason, str) else "eos",
            "stopping_word": reason if isinstance(reason, str) and not is_cut else "",
            "truncated": is_cut and self.max_tokens is not None and usage["completion_tokens"] < self.max_tokens,
            "has_new_line": "\n" in text,
            "tokens_predicted": usage["completion_tokens"],
            "tokens_evaluated": usage["prompt_tokens"],
            "timings": {
                "cache_n": usage["cached_tokens"],
                "prompt_n": usage["prompt_tokens"] - usage["cached_tokens"],
                "prompt_ms": timings["prefill_s"] * 1e3,
                "predicted_n": usage["completion_tokens"],
                "predicted_ms": timings["decode_s"] * 1e3,
            },
        }


async def with_tokens(body, tokenize):
    """Texts as token ids where ours takes ids: among the ids of a prompt, and as names in `logit_bias`."""
    body = dict(body)
    prompt, bias = body.get("prompt"), body.get("logit_bias")
    if is_mixed(prompt):
        body["prompt"] = await joined(prompt, tokenize)
    if bias:
        pairs = bias if isinstance(bias, list) else bias.items()
        body["logit_bias"] = {str(token): value for name, value in pairs for token in await bias_tokens(name, tokenize)}
    return body


def is_mixed(prompt):
    return isinstance(prompt, list) and {int, str} == {type(part) for part in prompt}


async def joined(prompt, tokenize):
    """The ids of a prompt of texts and ids."""
    parts = [[part] if isinstance(part, int) else await tokenize(part) for part in prompt]
    return [token for part in parts for token in part]


async def embedding(body, tokenize):
    """The body of ours for `/v1/embeddings`: its `input` is one text or list of ids, or a list of either kind."""
    given = body.get("input")
    if is_mixed(given):
        return {**body, "input": await joined(given, tokenize)}
    if not isinstance(given, list):
        return {**body, "input": text_of(given)}
    parts = [await joined(part, tokenize) if is_mixed(part) else text_of(part) for part in given]
    if {str, list} == {type(part) for part in parts}:
        parts = [await tokenize(part) if isinstance(part, str) else part for part in parts]
    return {**body, "input": parts}


def text_of(prompt):
    """The text of a prompt that is an object; anything else is itself."""
    if isinstance(prompt, dict) and set(prompt) == {"prompt_string"}:
        return prompt["prompt_string"]
    parts = prompt.get("content") if isinstance(prompt, dict) else None
    if isinstance(parts, list) and all(isinstance(part, dict) and set(part) == {"type", "text"} for part in parts):
        return "".join(part["text"] for part in parts)
    return prompt


async def bias_tokens(name, tokenize):
    return [name] if isinstance(name, int) or name.isdigit() else await tokenize(name)


def prompt_fields(prompt):
    """A prompt may be an object with its text under another name, and more."""
    if isinstance(prompt, dict) and "prompt_string" in prompt:
        return {"prompt": prompt["prompt_string"], **{name: value for name, value in prompt.items() if name != "prompt_string"}}
    return {} if prompt is None else {"prompt": prompt}


def probability(token):
    return {"id": token["id"], "token": token["text"], "bytes": list(token["text"].encode()), "logprob": token["logprob"]}


def with_defaults(body, defaults):
    """What llama-server takes from its command line where a request does not say it."""
    names = ("temperature", "seed", *([] if "max_tokens" in body else ["n_predict"]))
    return {**{name: defaults[name] for name in names if name in defaults}, **body}


def chat(body, defaults):
    """OpenAI's dialect, chats and completions."""
    body = with_defaults(body, defaults)
    if "n_predict" in body:
        body["max_tokens"] = body.pop("n_predict")
    if body.get("json_schema") is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "schema", "schema": body.pop("json_schema")}}
    return body


def conversation(body, defaults):
    """What the command line says about the chat template."""
    if "enable_thinking" in defaults:
        body = {**body, "chat_template_kwargs": {"enable_thinking": defaults["enable_thinking"], **body.get("chat_template_kwargs", {})}}
    return body


def template_body(body):
    """Of `/apply-template`, from a chat."""
    names = ("messages", "tools", "documents", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
    return {name: body[name] for name in names if name in body}


def chat_event(ours):
    """The first chunk has no text: llama-server says null, OpenAI the empty string."""
    for choice in ours.get("choices", []):
        if choice.get("delta", {}).get("content") == "" and "role" in choice["delta"]:
            choice["delta"]["content"] = None
    return ours


def error(status, ours):
    """Status and body of an error."""
    details = ours["error"]
    kind = details.get("code") or details["type"]
    status = 400 if status == 422 else status
    return status, {"error": {**details, "code": status, "type": ERROR_TYPES.get(kind, "invalid_request_error")}}


def slots(information):
    """`GET /` has the number of requests that run; which slot is whose does not matter to clients."""
    n_running = information["load"]["running"]
    return [{"id": i, "n_ctx": information["context_size"], "is_processing": i < n_running} for i in range(information["slots"])]


def metrics(text):
    """The text of `/metrics`, and headers that go with it."""
    sums = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            name = name.partition("{")[0].rpartition(":")[2]
            sums[name] = sums.get(name, 0.0) + float(value)
    lines = []
    for name, (kind, *ours) in METRICS.items():
        if any(one.lstrip("-") not in sums for one in ours):
            continue
        value = sum(-sums[one[1:]] if one.startswith("-") else sums[one] for one in ours)
        lines += [f"# HELP llamacpp:{name} {' '.join(ours)}", f"# TYPE llamacpp:{name} {kind}", f"llamacpp:{name} {value:g}"]
    start = sums.get("process_start_time_seconds")
    return "\n".join(lines) + "\n", {} if start is None else {"Process-Start-Time-Unix": f"{start:.0f}"}


def events(translate, line):
    """A line of a stream of server-sent events."""
    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
        return line
    return b"data: " + json.dumps(translate(json.loads(line[6:]))).encode() + b"\n"
