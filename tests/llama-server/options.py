"""llama-server's command line in terms of ours."""
import argparse
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "models" / "smollm2-135m-instruct-q4_1.gguf"
WORK = ROOT / "target" / "llama-server-suite"
# The default model takes the place of these, which no package has: one for texts, one for embeddings.
REPLACED_MODELS = [("ggml-org/test-model-stories260K", None), ("ggml-org/models", "bert-bge-small/ggml-model-f16.gguf")]

# Names that llama-server has for templates in its source; these are the same texts in Jinja.
TEMPLATES = {
    "chatml": """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "llama3": """{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}""",
    "command-r": """{% for m in messages %}<|START_OF_TURN_TOKEN|><|\
{{ {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT"}[m.role] }}_TOKEN|>{{ m.content | trim }}<|END_OF_TURN_TOKEN|>\
{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}""",
}


# What llama-server gives templates as `enable_thinking`; without the option, the template decides.
THINKING = {"on": True, "auto": True, "off": False, None: None}


class Untranslatable(Exception):
    """An option whose effect our server does not have."""


@dataclass
class Launch:
    """What to start, where to listen, and what requests get that do not say it."""

    arguments: list
    host: str
    port: int
    defaults: dict = field(default_factory=dict)


def parser():
    ap = argparse.ArgumentParser(prog="llama-server", allow_abbrev=False, exit_on_error=False)
    ap.add_argument("--host", default="127.0.0.1")
    ap.add_argument("--port", type=int, default=8080)
    ap.add_argument("--temp", type=float)
    ap.add_argument("--seed", type=int)
    ap.add_argument("--n-predict", type=int)
    ap.add_argument("--hf-repo")
    ap.add_argument("--hf-file")
    ap.add_argument("--alias")
    ap.add_argument("--ctx-size", type=int, default=2048)
    ap.add_argument("--batch-size", type=int)
    ap.add_argument("--parallel", type=int)
    ap.add_argument("--kv-unified", action="store_true")
    ap.add_argument("--embedding", action="store_true")
    ap.add_argument("--pooling", default="last")
    ap.add_argument("--api-key")
    ap.add_argument("--metrics", action="store_true")
    ap.add_argument("--chat-template")
    ap.add_argument("--chat-template-file")
    ap.add_argument("--reasoning", choices=["on", "off", "auto"])
    ap.add_argument("--cors-origins")
    ap.add_argument("--verbose", action="store_true")
    # Without effect here: our server always uses Jinja; nothing is downloaded; GET / has the load; and
    # where llama-server samples, and how it computes, changes no text.
    ap.add_argument("--ubatch-size")
    ap.add_argument("-fa")
    for flag in ["--jinja", "--no-jinja", "--offline", "--slots", "--no-slots", "--backend_sampling"]:
        ap.add_argument(flag, action="store_true")
    return ap


def translate(arguments):
    """The `Launch` that is the same for our server."""
    given, unknown = parser().parse_known_args(arguments)
    if unknown:
        raise Untranslatable(f"our server has nothing like {unknown[0]}")
    if "," in given.host:
        raise Untranslatable("our server listens on one address")
    if given.hf_repo and (given.hf_repo, given.hf_file) not in REPLACED_MODELS:
        raise Untranslatable(f"no package has the model {given.hf_repo} {given.hf_file or ''}")
    n_slots = given.parallel or 4
    # llama-server divides its context between slots unless they share one cache.
    is_shared = given.kv_unified or not given.parallel
    n_ctx = given.ctx_size if is_shared else given.ctx_size // n_slots
    ours = ["--model", str(MODEL), "--ctx", str(n_ctx), "--batch-size", str(n_slots),
            "--metrics", "open" if given.metrics else "off"]
    if given.alias and "," in given.alias:
        raise Untranslatable("a model has one name here")
    if given.alias:
        ours += ["--alias", given.alias]
    if is_shared:
        ours += ["--kv-cells", str(given.ctx_size)]
    if given.batch_size:
        ours += ["--n-batch", str(given.batch_size)]
    if given.embedding and given.pooling != "none":
        ours += ["--pooling", given.pooling]
    if given.api_key:
        ours += ["--api-key", given.api_key]
    for origin in origins(given.cors_origins or "*"): # llama-server's default
        ours += ["--cors-origin", origin]
    template = given.chat_template_file or given.chat_template and template_file(given.chat_template)
    if template:
        ours += ["--chat-template-file", str(Path(template).resolve())]
    defaults = {"temperature": given.temp, "seed": given.seed, "n_predict": given.n_predict, "n_ctx": n_ctx,
                "enable_thinking": THINKING[given.reasoning], "verbose": given.verbose or None}
    return Launch(ours, given.host, given.port, {name: value for name, value in defaults.items() if value is not None})


def origins(given):
    """`localhost` stands for loopback's names. Any other origin is itself."""
    if given == "localhost":
        return ["http://localhost", "http://127.0.0.1", "http://[::1]"]
    return given.split(",")


def template_file(name_or_text):
    text = TEMPLATES.get(name_or_text, name_or_text)
    file = WORK / "templates" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.jinja"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file
