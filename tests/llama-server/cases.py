"""What is known about the suite's cases: which are not applicable, and what the others expect of our model.

`scripts/llama-server-suite` fails where these lists are not true: a case that is not applicable must fail, and all that the
lists name must be in the suite.
"""

FILES = ["basic", "chat_completion", "compat_anthropic", "compat_oai_responses", "completion", "embedding", "ignore_eos", "metrics", "security", "stream", "template", "tokenize", "tool_call"]

_MODEL = "no package has the model"
_ROUTER = "no several models in one process, and no stream that outlives its connection"
_PORT = "origins are listed with their port: `--cors-origin` has none for all ports"
_DATE = "llama-server gives templates the date in variables of its own (`date_string`, `datetime`); ours, like transformers, in `strftime_now`"
_SETTINGS = "answers do not repeat the settings of their request (`generation_settings`)"
_REQUIRED = "unit/test_tool_call.py::test_completion_with_required_tool_real_model"
_SAMPLED = "`logprobs` are those of the model, before sampling (`post_sampling_probs`)"

_ANTHROPIC, _RESPONSES = (f"unit/test_compat_{name}.py::" for name in ["anthropic", "oai_responses"])

# A file, a function, a case or the beginning of cases and a *, with the reason.
NOT_APPLICABLE = [
    ("unit/test_basic.py::test_server_multiple_addresses", "the server listens on one address"),
    ("unit/test_basic.py::test_load_split_model", _MODEL),
    ("unit/test_basic.py::test_no_ui", "the page at `/` is for clients that ask for HTML, which this one does not; no option removes it"),
    ("unit/test_basic.py::test_server_model_aliases_and_tags", "a model has one name, and no tags"),
    (_ANTHROPIC + "test_anthropic_vision_base64_with_multimodal_model", _MODEL),
    (_ANTHROPIC + "test_anthropic_thinking_with_reasoning_model", _MODEL),
    (_ANTHROPIC + "test_anthropic_empty_messages", "a conversation without messages is an error, as in Anthropic's API"),
    (_RESPONSES + "test_responses_stream_with_llama_telemetry", "`return_progress` and `timings_per_token` are in chats only"),
    ("unit/test_completion.py::test_completion_stream_with_openai_library_stops", _MODEL),
    ("unit/test_completion.py::test_completion_response_fields[I believe the meaning of life is-32-response_fields1]", "an answer has all its fields: `response_fields` is refused"),
    ("unit/test_completion.py::test_n_probs_post_sampling", _SAMPLED),
    ("unit/test_completion.py::test_n_probs_post_backend_sampling", _SAMPLED),
    ("unit/test_embedding.py::test_embedding_mixed_input[-False]", "a text to embed is not empty, as in OpenAI's API"),
    ("unit/test_embedding.py::test_embedding_pooling_none", "no embeddings of single tokens"),
    ("unit/test_ignore_eos.py", _SETTINGS),
    ("unit/test_metrics.py::test_metrics_generation_rate_excludes_first_token", "timings are durations, without rates"),
    ("unit/test_metrics.py::test_metrics_timings_on_prompt_progress", "`return_progress` is in OpenAI's dialect only, without timings"),
    ("unit/test_security.py::test_access_static_assets_without_api_key", "the files of llama-server's page"),
    ("unit/test_security.py::test_cors_options[origin-Access-Control-Allow-Credentials-true]", "keys are sent in headers: no page needs credentials such as cookies"),
    ("unit/test_security.py::test_cors_origins_localhost_reflects[http://localhost:8080]", _PORT),
    ("unit/test_security.py::test_cors_origins_localhost_reflects[http://127.0.0.1:3000]", _PORT),
    ("unit/test_security.py::test_cors_origins_localhost_reflects[http://[::1]:3000]", _PORT),
    ("unit/test_security.py::test_cors_origins_defaults_to_localhost_with_tools_enabled", "no tools that the server runs"),
    ("unit/test_security.py::test_cors_proxy_only_forwards_explicit_proxy_headers", "no proxy for pages"),
    ("unit/test_security.py::test_local_media_file", "no images"),
    ("unit/test_stream.py", _ROUTER),
    ("unit/test_template.py::test_date_inside_prompt", _DATE),
    ("unit/test_tokenize.py::test_tokenize_with_bos", "the default model has no token that begins a text"),
    ("unit/test_tool_call.py::test_weather", _MODEL),
    ("unit/test_tool_call.py::test_calc_result", _MODEL),
    ("unit/test_tool_call.py::test_thoughts", _MODEL),
    ("unit/test_tool_call.py::test_hello_world", _MODEL),
]

# Templates of models, in whose place the default model must call tools, too.
TEMPLATE_OF = {
    f"bartowski/{model}-GGUF:Q4_K_M": f"../../../models/templates/{template}.jinja"
    for model, template in [
        ("DeepSeek-R1-Distill-Qwen-7B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"),
        ("Meta-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.1-8B-Instruct"),
        ("Phi-3.5-mini-instruct", "microsoft-Phi-3.5-mini-instruct"),
        ("Qwen2.5-1.5B-Instruct", "Qwen-Qwen2.5-7B-Instruct"),
        ("Qwen2.5-7B-Instruct", "Qwen-Qwen2.5-7B-Instruct"),
        ("Qwen2.5-Coder-3B-Instruct", "Qwen-Qwen2.5-7B-Instruct"),
        ("gemma-2-2b-it", "google-gemma-2-2b-it"),
    ]
}

# Expectations in another model's or server's terms: function, old text, how often, new text, reason.
_TEXT = "another model's text"
_COUNT = "another tokenizer"
_PREFLIGHT = "a preflight is answered with 204, which says that it has no body"
_ANY = "with any origin allowed, the answer says `*`"
_BUILD = "the fingerprint begins with our name"
_IMAGE = "a model that sees no images gets none: that is the request's fault, not the server's"
_LIMIT = "`max_tokens: 0` would be refused first"
_CHAT, _COMPLETION, _EMBEDDING, _SECURITY = (
    f"unit/test_{name}.py::" for name in ["chat_completion", "completion", "embedding", "security"]
)
REPLACED = [
    (_CHAT + "test_chat_completion", "\"But she couldn't\", 69", 2, r'"\\S", 16', _COUNT),
    (_CHAT + "test_chat_completion", r'"(Suddenly)+|\\{ \" Sarax.", 77', 3, r'"\\S", 20', _COUNT),
    (_CHAT + "test_chat_completion", '"^ blue",                    23', 1, r'"\\S", 9', _COUNT),
    (_CHAT + "test_chat_completion", '"(Aside|she|felter|alonger)+", 104', 2, r'"\\S", 29', _COUNT),
    (_CHAT + "test_chat_completion", '"Whillicter", 79', 2, r'"\\S", 21', _COUNT),
    (_CHAT + "test_chat_completion", 'startswith("b")', 1, 'startswith("medusa-llama")', _BUILD),
    (_CHAT + "test_chat_completion_cached_tokens", '77, 0)', 1, "26, 0)", _COUNT),
    (_CHAT + "test_chat_completion_cached_tokens", '77, 76)', 1, "26, 25)", _COUNT),
    (_CHAT + "test_chat_completion_cached_tokens", '77, 51)', 1, "26, 19)", _COUNT),
    (_CHAT + "test_chat_completion_cached_tokens", '77, 47)', 1, "26, 15)", _COUNT),
    (_CHAT + "test_chat_completion_stream", '"(Suddenly)+", 77', 1, r'"\\S", 20', _COUNT),
    (_CHAT + "test_chat_completion_stream", '"(Aside|she|felter|alonger)+", 104', 1, r'"\\S", 29', _COUNT),
    (_CHAT + "test_chat_completion_stream", 'startswith("b")', 1, 'startswith("medusa-llama")', _BUILD),
    (_CHAT + "test_chat_completion_with_openai_library", '"(Suddenly)+"', 1, r'"\\S"', _TEXT),
    (_CHAT + "test_chat_completion_with_openai_library", 'startswith("b")', 1, 'startswith("medusa-llama")', _BUILD),
    (_CHAT + "test_chat_template", '"<s> ', 1, '"', "our model has no token that begins a text"),
    (_CHAT + "test_chat_template_assistant_prefill", r'"Wh\n\nill"', 1, r'"Wh\nill"', "parts of a text are joined with one line's end, continued or not"),
    (_CHAT + "test_completion_with_response_format", '"sound"}, 0', 1, '"sound"}, 8', _LIMIT),
    (_CHAT + "test_completion_with_response_format", '"schema": 123}, 0', 1, '"schema": 123}, 8', _LIMIT),
    (_CHAT + "test_completion_with_response_format", '"type": 123}}, 0', 1, '"type": 123}}, 8', _LIMIT),
    (_CHAT + "test_completion_with_response_format", '"hiccup"}}, 0', 1, '"hiccup"}}, 8', _LIMIT),
    (_CHAT + "test_return_progress", "(64, 4, False)", 1, "(64, 3, False)", _COUNT),
    *((_ANTHROPIC + f"test_anthropic_{name}", "== 500", 1, "== 400", _IMAGE) for name in ["tool_result_with_image", "vision_format_accepted"]),
    *((_ANTHROPIC + f"test_anthropic_{name}", "image input is not supported", 1, "reads only text", "our words") for name in ["tool_result_with_image", "vision_format_accepted"]),
    (_RESPONSES + "test_responses_with_openai_library", '"(Suddenly)+"', 1, r'"\\S"', _TEXT),
    (_RESPONSES + "test_responses_stream_with_openai_library", '"(Suddenly)+"', 1, r'"\\S"', _TEXT),
    (_COMPLETION + "test_completion", '"(going|bed)+", 18', 1, r'"\\S", 7', _COUNT),
    (_COMPLETION + "test_completion", '"(princesses|everyone|kids|Anna|forest)+", 46', 1, r'"\\S", 15', _COUNT),
    (_COMPLETION + "test_completion_stream", '"(going|bed)+", 18', 1, r'"\\S", 7', _COUNT),
    (_COMPLETION + "test_completion_stream", '"(princesses|everyone|kids|Anna|forest)+", 46', 1, r'"\\S", 15', _COUNT),
    (_COMPLETION + "test_completion_with_openai_library", '"(going|bed)+"', 1, r'"\\S"', _TEXT),
    (_COMPLETION + "test_completion_with_openai_library", 'startswith("b")', 1, 'startswith("medusa-llama")', _BUILD),
    (_COMPLETION + "test_completion_stream_with_openai_library", '"(going|bed)+"', 1, r'"\\S"', _TEXT),
    (_COMPLETION + "test_nocache_long_input_prompt", "*32", 1, "*64", "with our tokenizer 32 times the prompt fits"),
    (_COMPLETION + "test_completion_prompt_cache", "*5 + 2", 1, "*3", _COUNT),
    (_EMBEDDING + "test_embedding_error_prompt_too_long", "too large", 1, "maximum context length", "our words"),
    (_EMBEDDING + "test_embedding_usage_single", "is\", 9)", 1, "is\", 7)", _COUNT),
    (_EMBEDDING + "test_embedding_usage_single", "test\", 6)", 1, "test\", 4)", _COUNT),
    (_EMBEDDING + "test_embedding_usage_multiple", "2 * 9", 1, "2 * 7", _COUNT),
    ("unit/test_metrics.py::test_metrics_disabled", "501", 1, "404", "metrics that are off are no path of the server"),
    (
        _REQUIRED,
        "server.model_hf_repo = hf_repo", 1,
        'server.chat_template_file = None if template_override else __import__("cases").TEMPLATE_OF[hf_repo]',
        "the default model with the template of the other one: what must be called does not depend on the model",
    ),
    (_SECURITY + "test_cors_options", '"Access-Control-Allow-Origin", "localhost"', 1, '"Access-Control-Allow-Origin", "*"', _ANY),
    (_SECURITY + "test_cors_options", '"Access-Control-Allow-Origin", "web.mydomain.fr"', 1, '"Access-Control-Allow-Origin", "*"', _ANY),
    (_SECURITY + "test_cors_options", '"GET, POST, DELETE, OPTIONS"', 1, '"GET, HEAD, POST"', "the methods that there are"),
    (_SECURITY + "test_cors_options", '"Access-Control-Allow-Headers", "*"', 1, '"Access-Control-Allow-Headers", "Authorization"', "in browsers `*` does not include `Authorization`"),
    (_SECURITY + "test_cors_options", "== 200", 1, "== 204", _PREFLIGHT),
    (_SECURITY + "test_cors_origins_localhost_reflects", "== 200", 1, "== 204", _PREFLIGHT),
    (_SECURITY + "test_cors_origins_localhost_rejects", "== 200", 1, "== 204", "as a request without CORS"),
]

# Checks of what our server does not promise, in cases that check more: function, text of their lines, reason.
LEFT_OUT = [
    ("unit/test_basic.py::test_server_props", '["seed"]', "the server has no default seed"),
    ("unit/test_basic.py::test_server_slots", "== 501", "no option hides the load"),
    ("unit/test_basic.py::test_server_slots", '"error" in', "no option hides the load"),
    (_COMPLETION + "test_completion_stream", "generation_settings", _SETTINGS),
    (_COMPLETION + "test_completion_response_fields", 'assert "generation_settings" in', _SETTINGS),
    ("unit/test_metrics.py::test_metrics_prometheus_format", "llamacpp:n_tokens_max", "no largest context since the start"),
    ("unit/test_metrics.py::test_metrics_prometheus_format", "_tokens_seconds", "no averages since the start: Prometheus computes rates of counters"),
    ("unit/test_metrics.py::test_metrics_prometheus_format", "n_busy_slots_per_decode", "no averages since the start: Prometheus computes rates of counters"),
    ("unit/test_metrics.py::test_metrics_timings_are_finite", "prompt_per_token_ms", "timings are durations, without rates"),
]

# Cases that count what a server did since its start, or what its cache has not.
NEEDS_FRESH_SERVER = {
    _CHAT + "test_chat_completion_cached_tokens",
    _CHAT + "test_return_progress",
    _COMPLETION + "test_completion",
    _COMPLETION + "test_completion_stream",
    "unit/test_metrics.py::test_metrics_predicted_total_matches_requests",
    "unit/test_metrics.py::test_metrics_prompt_processed_and_cached",
}

# Files and cases that ask for no text, so that their servers need no drafts.
GENERATES_NOTHING = [
    _CHAT + "test_apply_chat_template",
    _CHAT + "test_chat_template_continue_final_message_mutual_exclusion",
    "unit/test_embedding.py",
    "unit/test_metrics.py::test_metrics_embedding_prompt_is_counted",
    _SECURITY + "test_cors*",
    "unit/test_template.py",
    "unit/test_tokenize.py",
]


def function(case):
    return case.partition("[")[0]


def reason(case):
    """Why a case is not applicable, if it is not."""
    found = [reason for pattern, reason in NOT_APPLICABLE if matches(pattern, case)]
    assert len(found) < 2, f"{case} has {len(found)} reasons"
    return found[0] if found else None


def left_out(case):
    """What a case does not check, in words."""
    return list(dict.fromkeys(reason for name, _, reason in LEFT_OUT if name == function(case)))


def matches(pattern, case):
    if pattern.endswith("*"):
        return case.startswith(pattern[:-1])
    return pattern in (case, function(case), case.partition("::")[0])
