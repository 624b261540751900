"""Asks a server for texts, several at a time, and notes when what arrives. Standard library only."""
import json
import queue
import threading
import time
import urllib.request
from dataclasses import dataclass, field

CHATML = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
          "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")


@dataclass
class Answer:
    """One request's: tokens and times, in seconds since the epoch of `time.perf_counter`."""
    category: str
    tokens: int = 0
    sent: float = 0.0
    pieces: list = field(default_factory=list)
    end: float = 0.0
    text: str = ""


def prompts(path, how_many):
    """`how_many` prompts spread over the file, each with its category."""
    with open(path) as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    if not rows:
        raise SystemExit(f"{path} has no prompts")
    n = min(how_many or len(rows), len(rows))
    chosen = (rows[i * len(rows) // n] for i in range(n))
    return [(row["turns"][0] if "turns" in row else row["prompt"], row.get("category", "all")) for row in chosen]


def body_of(kind, prompt, max_tokens, extra):
    """Greedy and streamed; from no cached prompt where that can be asked for."""
    body = {"temperature": 0, "stream": True}
    if kind == "openai":
        return body | {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens,
                       "stream_options": {"include_usage": True}} | extra
    ours = {"max_tokens": max_tokens, "raw": True}
    return body | {"prompt": prompt, "cache_prompt": False} | ({"n_predict": max_tokens} if kind == "llama" else ours) | extra


def piece_of(kind, event):
    """The text of an event, thoughts included."""
    if kind != "openai":
        return event.get("content") if kind == "llama" else event.get("generated_text")
    deltas = [choice.get("delta") or {} for choice in event.get("choices") or []]
    return "".join(delta.get(key) or "" for delta in deltas for key in ("reasoning_content", "reasoning", "content"))


def tokens_of(kind, event):
    """Tokens of the answer, if an event says how many."""
    return event.get("tokens_predicted") if kind == "llama" else (event.get("usage") or {}).get("completion_tokens")


PATHS = {"llama": "/completion", "ours": "/generate", "openai": "/v1/chat/completions"}


def ask(kind, url, prompt, category, max_tokens, extra=None, stopped=lambda: False, headers=None):
    """One request, to the end, or until it is `stopped`, by hanging up. A server that counts no tokens has one in each piece."""
    answer = Answer(category, sent=time.perf_counter())
    body = json.dumps(body_of(kind, prompt, max_tokens, extra or {})).encode()
    request = urllib.request.Request(url + PATHS[kind], body, {"Content-Type": "application/json", **(headers or {})})
    with urllib.request.urlopen(request, timeout=900) as response:
        for line in response:
            if not line.startswith(b"data:") or line.startswith(b"data: [DONE]"):
                continue
            now, event = time.perf_counter(), json.loads(line[5:])
            if "error" in event:
                raise RuntimeError(event["error"])
            if piece := piece_of(kind, event):
                answer.pieces.append(now)
                answer.text += piece
            answer.tokens = tokens_of(kind, event) or answer.tokens
            if stopped():
                break
    answer.end = time.perf_counter()
    answer.tokens = answer.tokens or len(answer.pieces)
    return answer


def run(kind, url, asked, parallel, max_tokens, template=CHATML, extra=None, headers=None):
    """All prompts, `parallel` at a time; returns the answers, the errors and the seconds it took."""
    todo, answers, errors = queue.Queue(), [], []
    for prompt in asked:
        todo.put(prompt)

    def work():
        while True:
            try:
                prompt, category = todo.get_nowait()
            except queue.Empty:
                return
            try:
                answers.append(ask(kind, url, template.replace("{}", prompt), category, max_tokens, extra, headers=headers))
            except Exception as error:  # whatever it is, the run goes on and says so
                errors.append(f"{type(error).__name__}: {error}")

    started = time.perf_counter()
    threads = [threading.Thread(target=work, daemon=True) for _ in range(parallel)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, errors, time.perf_counter() - started


def percentile(values, share):
    """The value that this share of them is below, to the tenth of a millisecond; None of none."""
    values = sorted(values)
    return round(values[min(len(values) - 1, int(share * len(values)))], 4) if values else None


def figures(answers, errors, seconds, parallel):
    """What a run comes to, as a JSON object."""
    first = [a.pieces[0] - a.sent for a in answers if a.pieces]
    gaps = [b - a for answer in answers for a, b in zip(answer.pieces, answer.pieces[1:])]
    tokens = sum(a.tokens for a in answers)
    out = {"requests": len(answers), "errors": len(errors), "tokens": tokens, "seconds": round(seconds, 3),
           "tok_per_s": round(tokens / seconds, 3), "ttft_p50": percentile(first, .5), "ttft_p95": percentile(first, .95),
           "gap_p50": percentile(gaps, .5), "gap_p95": percentile(gaps, .95), "gap_max": percentile(gaps, 1)}
    if errors:
        out["first_error"] = errors[0]
    if parallel == 1:
        out["categories"] = {}
        for category in sorted({a.category for a in answers}):
            of = [a for a in answers if a.category == category]
            took = sum(a.end - a.sent for a in of)
            out["categories"][category] = round(sum(a.tokens for a in of) / max(took, 1e-9), 3)
    return out
