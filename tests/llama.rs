//! The FFI layer, with the default model: arguments are checked before each call, and the tap sees
//! what llama.cpp computes.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use common::context::{MODEL, context, feed, params, rows_are_independent};
use medusa_llama::llama::{Context, ContextParams, LlamaError, SeqId, Token};

#[test]
fn text_survives_tokenising_and_back() {
    for text in ["Hello, world", "naïve café 😀 日本語", "tabs\tand\nlines", " leading", "a\0b"]
    {
        assert_eq!(MODEL.detokenize(&MODEL.tokenize(text, false).unwrap()), text);
    }
    let special = MODEL.tokenize("<|im_start|>", true).unwrap();
    assert_eq!(special.len(), 1);
    assert!(MODEL.tokenize("<|im_start|>", false).unwrap().len() > 1);
    let mut bytes = vec![];
    MODEL.piece(special[0], false, &mut bytes);
    assert!(bytes.is_empty(), "control tokens have no text");
}

#[test]
fn metadata_tells_what_the_file_is() {
    assert_eq!((MODEL.n_vocab(), MODEL.n_embd()), (49_152, 576));
    assert_eq!(MODEL.meta("llama.block_count").as_deref(), Some("30"));
    assert_eq!(MODEL.quantization(), "Q4_1");
    assert_eq!(MODEL.meta("general.architecture").as_deref(), Some("llama"));
    assert_eq!(MODEL.meta("no.such.key"), None);
    assert!(MODEL.chat_template().unwrap().contains("<|im_start|>"));
    assert!(MODEL.is_end(Token(2)) && !MODEL.is_end(Token(-1)) && !MODEL.is_end(Token(i32::MAX)));
}

#[test]
fn what_does_not_fit_is_refused_before_it_crosses() {
    let mut context = context(&params());
    let mut batch = context.batch();
    let refused =
        |r: Result<usize, LlamaError>| assert!(matches!(r, Err(LlamaError::Batch(_))), "{r:?}");
    refused(batch.add(Token(-1), 0, &[SeqId(0)], true));
    refused(batch.add(Token(49_152), 0, &[SeqId(0)], true));
    refused(batch.add(Token(1), 0, &[], true));
    refused(batch.add(Token(1), 0, &[SeqId(4)], true));
    refused(batch.add(Token(1), 0, &[SeqId(0); 5], true));
    refused(batch.add(Token(1), usize::MAX, &[SeqId(0)], true));
    for pos in 0..64 {
        batch.add(Token(1), pos, &[SeqId(0)], pos == 63).unwrap();
    }
    refused(batch.add(Token(1), 64, &[SeqId(0)], true));
    context.forward(&batch).unwrap();
    assert!(
        context.logits(63).is_ok() && context.logits(0).is_err() && context.logits(64).is_err()
    );
    assert_eq!(
        (context.cached_len(SeqId(0)), context.cached_len(SeqId(1)), context.cached_len(SeqId(9))),
        (Some(64), Some(0), None)
    );

    batch.clear();
    assert!(context.forward(&batch).is_err(), "no rows");
    batch.add(Token(1), 90, &[SeqId(0)], true).unwrap();
    assert!(matches!(context.forward(&batch), Err(LlamaError::Batch(_))), "a gap in the positions");
    assert!(context.logits(0).is_err(), "nothing is left of an earlier pass");
    assert!(
        context.remove_from(SeqId(4), 0).is_err()
            && context.share(SeqId(0), SeqId(4), 0..1).is_err()
    );
    let streams = ContextParams { unified: false, ..params() };
    let mut streams = Context::new(Arc::clone(&MODEL), &streams).unwrap();
    refused(streams.batch().add(Token(1), 0, &[SeqId(0), SeqId(1)], true));
    assert!(streams.share(SeqId(0), SeqId(1), 0..1).is_err());
    let tapped = ContextParams { unified: false, tap_hidden: true, ..params() };
    assert!(Context::new(Arc::clone(&MODEL), &tapped).is_err());
    assert!(Context::new(Arc::clone(&MODEL), &ContextParams { n_seq_max: 0, ..params() }).is_err());
}

#[test]
fn a_context_may_have_more_sequences_than_rows() {
    let mut context = context(&ContextParams { n_batch: 2, n_ubatch: 2, n_seq_max: 9, ..params() });
    feed(&mut context, &[Token(1), Token(2)], 0, 8);
    assert!(context.logits(1).is_ok());
}

#[test]
fn a_full_cache_is_an_error_and_leaves_the_cache_as_it_was() {
    let mut context = context(&ContextParams { n_cells: 256, ..params() });
    let cells = context.n_cells();
    let tokens = vec![Token(5); 64];
    for from in (0..cells).step_by(64) {
        feed(&mut context, &tokens, from, 0);
    }
    let mut batch = context.batch();
    batch.add(Token(5), 0, &[SeqId(1)], true).unwrap();
    assert!(matches!(context.forward(&batch), Err(LlamaError::NoRoom { rows: 1 })));
    assert_eq!(context.cached_len(SeqId(0)), Some(cells));
    context.remove_from(SeqId(0), cells - 1).unwrap();
    context.forward(&batch).unwrap();
}

#[test]
fn a_shared_prefix_gives_the_logits_of_a_computed_one() {
    let text = MODEL.tokenize("The quick brown fox jumps over", false).unwrap();
    let (last, prefix) = text.split_last().unwrap();
    let mut context = context(&params());
    feed(&mut context, prefix, 0, 0);
    context.share(SeqId(0), SeqId(1), 0..prefix.len()).unwrap();
    feed(&mut context, &[*last], prefix.len(), 1);
    let shared = context.logits(0).unwrap().to_vec();
    context.clear();
    feed(&mut context, prefix, 0, 2);
    feed(&mut context, &[*last], prefix.len(), 2);
    let computed = context.logits(0).unwrap();
    let far = shared.iter().zip(computed).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let most = if rows_are_independent() { 0.0 } else { 1e-3 };
    assert!(far <= most, "{far}");
}

/// The tap's rows are what llama.cpp calls embeddings, in the batch's order, also over several
/// micro-batches.
#[test]
fn the_tap_sees_the_hidden_state_of_output_rows() {
    let text = MODEL
        .tokenize(
            "It was the best of times, it was the worst of times, it was the age of wisdom",
            false,
        )
        .unwrap();
    let wanted: Vec<usize> = (0..text.len()).filter(|i| i % 3 == 2).collect();
    let mut tapped = context(&ContextParams { tap_hidden: true, n_ubatch: 8, ..params() });
    let mut batch = tapped.batch();
    for (i, &token) in text.iter().enumerate() {
        batch.add(token, i, &[SeqId(0)], wanted.contains(&i)).unwrap();
    }
    tapped.forward(&batch).unwrap();
    assert!(tapped.hidden(0).is_err(), "a row without output");

    let mut reference = context(&ContextParams { embeddings: true, ..params() });
    feed(&mut reference, &text, 0, 0);
    for &row in &wanted {
        let (a, b) = (tapped.hidden(row).unwrap(), reference.embedding(row).unwrap());
        let norm = b.iter().map(|v| v * v).sum::<f32>().sqrt();
        let far = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
        let most = if rows_are_independent() { 0.0 } else { norm * 0.02 };
        assert!(norm > 1.0 && far <= most, "row {row}: {far} of {norm}");
    }
    assert!(context(&params()).hidden(0).is_err(), "a context without the tap");
}

/// A long text is cut at its control tokens, which changes no token, and takes a time linear in its
/// length: the square of 8 would be 64.
#[test]
fn control_tokens_cut_a_long_text_without_changing_its_tokens() {
    let unit = "<|im_start|>user\nhow  are you?<|im_end|>\n  so<|im_end|>";
    let units = [unit, " <|im_end|>", "<|im_end", "<|im_start|> |>  "].repeat(300);
    let text = units.concat();
    let parts = text.split_inclusive("<|im_end|>").enumerate();
    let each = parts.flat_map(|(i, part)| MODEL.tokenize_part(part, i == 0, true).unwrap());
    assert_eq!(MODEL.tokenize(&text, true).unwrap(), each.collect::<Vec<_>>());
    assert_eq!(MODEL.detokenize(&MODEL.tokenize(&text, false).unwrap()), text, "names are text");
    let seconds = |n: usize| {
        let text = "<|im_end|>".repeat(n);
        let begun = std::time::Instant::now();
        assert_eq!(MODEL.tokenize(&text, true).unwrap().len(), n);
        begun.elapsed().as_secs_f64()
    };
    let (short, long) = (seconds(12_500), seconds(100_000));
    assert!(long < 24.0 * short.max(0.01), "{short} s, and {long} s for eight times as many");
}
