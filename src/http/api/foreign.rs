//! Fields that other servers know and this one does not have: what each would change, so that a body
//! is never answered as if one that matters had not been there.
//!
//! A field that a body declares is no foreign one, whatever stands here.

use serde_json::Value;

use crate::error::{Invalid, shortened};

/// What a foreign field does to an answer.
enum Effect {
    /// None: any value is ignored.
    None,
    /// It changes the answer, unless it has one of these values (a JSON list).
    Unless(&'static str),
    /// As `Unless(EMPTY)`, and this server has the same under another name.
    Named(&'static str),
}
use Effect::{Named, None as Nothing, Unless};

/// Off, in any type.
const EMPTY: &str = r#"[false, 0, "", [], {}]"#;
/// No value is off.
const NEVER: &str = "[]";

/// Names, each with its effect.
const FIELDS: &[(&str, Effect)] = &[
    // llama-server: sampling.
    ("dynatemp_exponent", Nothing), // of dynatemp_range
    ("dynatemp_range", Unless("[0]")),
    ("min_keep", Unless("[0, 1]")),
    ("mirostat", Unless("[0]")),
    ("mirostat_eta", Nothing), // of mirostat
    ("mirostat_tau", Nothing),
    ("penalize_nl", Unless("[false]")),
    ("repeat_penalty", Named("repetition_penalty")),
    (
        "samplers",
        Unless(
            r#"["edskypmxt", "edkypmxt",
                ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]]"#,
        ),
    ),
    ("tfs_z", Unless("[1]")),
    // llama-server: what else is in the prompt and the answer.
    ("grammar_lazy", Unless("[false]")),
    ("grammar_triggers", Unless("[[]]")),
    ("image_data", Unless(EMPTY)),
    ("json_schema", Named("response_format")),
    ("lora", Unless(EMPTY)),
    ("n_indent", Unless("[0]")),
    ("n_predict", Named("max_tokens")),
    ("n_probs", Named("logprobs")),
    ("post_sampling_probs", Unless("[false]")),
    ("preserved_tokens", Unless("[[]]")),
    ("reasoning_budget_tokens", Named("thinking_budget_tokens")),
    ("reasoning_format", Unless(r#"["none", "auto"]"#)),
    ("response_fields", Unless("[[]]")),
    ("return_tokens", Named("details")),
    ("t_max_predict_ms", Unless("[0, -1]")),
    ("t_max_prompt_ms", Unless("[0, -1]")),
    ("thinking_forced_open", Unless("[false]")),
    // llama-server: where and how fast.
    ("backend_sampling", Nothing),
    ("id_slot", Nothing),
    ("n_cache_reuse", Nothing),
    ("n_discard", Nothing), // no context is shifted here
    ("n_keep", Nothing),
    ("parse_tool_calls", Nothing),
    ("slot_id", Nothing),
    ("speculative.n_max", Nothing), // no draft changes a text
    ("speculative.n_min", Nothing),
    ("speculative.p_min", Nothing),
    ("timings_per_token", Nothing),
    ("verbose", Nothing),
    // vLLM, SGLang, TGI, mistral.rs.
    ("adapter_id", Unless(EMPTY)),
    ("add_special_tokens", Unless("[true]")),
    ("allowed_token_ids", Unless(NEVER)),
    ("bad_words", Unless(EMPTY)),
    ("cache_salt", Named("share_text and cache_prompt")),
    ("chat_template", Unless(NEVER)),
    ("custom_logit_processor", Unless(NEVER)),
    ("decoder_input_details", Unless("[false]")),
    ("early_stopping", Unless("[false]")),
    ("ebnf", Named("grammar")),
    ("enable_thinking", Unless(NEVER)),
    ("guided_choice", Named("grammar")),
    ("guided_decoding_backend", Nothing),
    ("guided_grammar", Named("grammar")),
    ("guided_json", Named("response_format")),
    ("guided_regex", Named("grammar")),
    ("guided_whitespace_pattern", Unless(NEVER)),
    ("include_reasoning", Unless("[true]")),
    ("include_stop_str_in_output", Unless("[false]")),
    ("kv_transfer_params", Unless("[{}]")),
    ("length_penalty", Unless("[1]")),
    ("logits_processors", Unless(EMPTY)),
    ("lora_path", Unless(EMPTY)),
    ("max_new_tokens", Named("max_tokens")),
    ("mm_processor_kwargs", Unless("[{}]")),
    ("no_stop_trim", Unless("[false]")),
    ("priority", Nothing),
    ("prompt_embeds", Unless(EMPTY)),
    ("prompt_logprobs", Unless(NEVER)),
    ("regex", Named("grammar")),
    ("request_id", Nothing),
    ("return_full_text", Unless("[false]")),
    ("return_hidden_states", Unless("[false]")),
    ("return_token_ids", Named("details")),
    ("return_tokens_as_token_ids", Unless("[false]")),
    ("rid", Nothing),
    ("separate_reasoning", Unless("[false]")),
    ("skip_special_tokens", Unless("[true]")),
    ("spaces_between_special_tokens", Unless("[true]")),
    ("stop_regex", Unless(EMPTY)),
    ("stream_reasoning", Nothing),
    ("structural_tag", Unless(NEVER)),
    ("structured_outputs", Named("response_format or grammar")),
    ("truncate", Unless(NEVER)),
    ("truncate_prompt_tokens", Unless(NEVER)),
    ("use_beam_search", Unless("[false]")),
    ("vllm_xargs", Unless("[{}]")),
    ("watermark", Unless("[false]")),
    // text-generation-webui, KoboldCpp, TabbyAPI, Aphrodite.
    ("ban_eos_token", Named("ignore_eos")),
    ("banned_tokens", Unless(EMPTY)),
    ("cfg_scale", Unless("[1]")),
    ("custom_token_bans", Unless(EMPTY)),
    ("do_sample", Unless("[true]")),
    ("dynamic_temperature", Unless("[false]")),
    ("encoder_repetition_penalty", Unless("[1]")),
    ("epsilon_cutoff", Unless("[0]")),
    ("eta_cutoff", Unless("[0]")),
    ("grammar_string", Named("grammar")),
    ("guidance_scale", Unless("[1]")),
    ("max_length", Named("max_tokens")),
    ("min_length", Named("min_tokens")),
    ("mirostat_mode", Unless("[0]")),
    ("negative_prompt", Unless(EMPTY)),
    ("no_repeat_ngram_size", Unless("[0]")),
    ("num_beams", Unless("[1]")),
    ("penalty_alpha", Unless("[0]")),
    ("rep_pen", Unless("[1]")),
    ("sampler_order", Unless(NEVER)),
    ("sampler_priority", Unless(NEVER)),
    ("skew", Unless("[0]")),
    ("smoothing_curve", Nothing), // of smoothing_factor
    ("smoothing_factor", Unless("[0]")),
    ("stop_sequence", Named("stop")),
    ("temperature_last", Unless("[true]")), // as here
    ("tfs", Unless("[1]")),
    ("top_a", Unless("[0]")),
    // Ollama.
    ("context", Unless(EMPTY)),
    ("format", Named("response_format")),
    ("images", Unless(EMPTY)),
    ("keep_alive", Nothing),
    ("num_ctx", Unless(NEVER)),
    ("num_predict", Named("max_tokens")),
    ("options", Unless("[{}]")),
    ("template", Unless(EMPTY)),
    ("think", Unless("[false]")),
    // OpenAI, Mistral, OpenRouter.
    ("audio", Unless(NEVER)),
    ("metadata", Nothing),
    ("plugins", Unless(EMPTY)),
    ("prediction", Nothing),
    ("prompt_cache_key", Nothing),
    ("prompt_cache_retention", Nothing),
    ("provider", Nothing),
    ("random_seed", Named("seed")),
    ("reasoning", Nothing), // as reasoning_effort
    ("safe_prompt", Unless("[false]")),
    ("safety_identifier", Nothing),
    ("service_tier", Nothing),
    ("store", Nothing),
    ("thinking", Nothing), // as reasoning_effort
    ("transforms", Unless(EMPTY)),
    ("usage", Nothing),
    ("user", Nothing),
    ("web_search_options", Unless(NEVER)),
];

/// Whether a field is a foreign one that may be ignored.
///
/// # Errors
/// It is one that would change the answer.
pub fn is_ignored(name: &str, value: &Value) -> Result<bool, Invalid> {
    let Some((name, effect)) = FIELDS.iter().find(|(known, _)| *known == name) else {
        return Ok(false);
    };
    let (off, instead) = match effect {
        Nothing => return Ok(true),
        Unless(off) => (*off, None),
        Named(other) => (EMPTY, Some(other)),
    };
    let off: Vec<Value> = serde_json::from_str(off).expect("a JSON list, which a test reads");
    if off.iter().any(|off| is_same(off, value)) {
        return Ok(true);
    }
    let shown = shortened(&value.to_string(), 60).into_owned();
    let what_to_do = match (instead, off.is_empty()) {
        (Some(instead), _) => format!("use {instead}"),
        (None, true) => "leave it out".into(),
        (None, false) => {
            let values: Vec<String> = off.iter().map(Value::to_string).collect();
            format!("leave it out, or send {}", values.join(" or "))
        }
    };
    Err(Invalid::new(
        name,
        format!("{name} is {shown}, but this server does not support it: {what_to_do}"),
    ))
}

/// Whether two values are equal; 1 and 1.0 are.
fn is_same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_would_change_an_answer_is_refused_and_what_would_not_is_ignored() {
        for (name, effect) in FIELDS {
            let n = FIELDS.iter().filter(|(other, _)| other == name).count();
            assert_eq!(n, 1, "{name} is there once");
            let matters = is_ignored(name, &json!("some value"));
            assert_eq!(matters.is_err(), !matches!(effect, Nothing), "{name}");
        }
        for (name, off, on) in [
            ("mirostat", json!(0.0), json!(2)),
            ("skip_special_tokens", json!(true), json!(false)),
            ("length_penalty", json!(1), json!(0.5)),
            ("lora", json!([]), json!([{ "id": 0, "scale": 1.0 }])),
            ("ban_eos_token", json!(false), json!(true)),
            ("samplers", json!("edskypmxt"), json!(["top_k"])),
        ] {
            assert_eq!(is_ignored(name, &off), Ok(true), "{name}");
            let error = is_ignored(name, &on).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(name));
            assert!(error.message.contains("does not support"), "{error}");
        }
        assert!(
            is_ignored("max_new_tokens", &json!(5)).unwrap_err().message.contains("use max_tokens")
        );
        assert_eq!(is_ignored("zzz", &json!(1)), Ok(false));
    }
}
