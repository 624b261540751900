//! A loaded GGUF model: weights, vocabulary, metadata. Immutable after loading, so any thread may
//! read it.

use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::OnceLock;

use super::adapter::{Adapter, AdapterFile};
use super::backend::{start_backend, text};
use super::check::check;
use super::error::LlamaError;
use super::gguf::{Gguf, MatrixRows};
use super::ids::Token;
use super::loading::Loading;
use super::pieces::{Special, Specials};
use super::placement::Placement;
use super::shards::model_files;
use super::workers::{Division, connect, divide};
use super::{log, sys};

/// What a model keeps of the tokens that it has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Keys and values of each token, in cells: any suffix can be dropped.
    Cells,
    /// The same, but some layers look at the last tokens only, so many of them: their cells may be freed
    /// beyond that.
    Window(usize),
    /// A state that all tokens of a sequence went into, beside cells or instead of them. It can be
    /// copied and dropped, but not taken back by more than [`Context::n_rollback`] tokens.
    ///
    /// [`Context::n_rollback`]: super::Context::n_rollback
    State,
}

/// A model and its vocabulary.
#[derive(Debug)]
pub struct Model {
    ptr: NonNull<sys::llama_model>,
    vocab: NonNull<sys::vocab>,
    /// Not empty: the file it was loaded from, and its further shards.
    files: Vec<PathBuf>,
    is_outline: bool,
    draft_layers: bool,
    /// As the file says: llama.cpp changes its own number when a context scales positions.
    n_ctx_train: usize,
    /// All contexts compute with them.
    adapters: Vec<Adapter>,
    longest_token: OnceLock<usize>,
    /// `None` if a text cannot be cut at them.
    specials: OnceLock<Option<Specials>>,
}

// SAFETY: after loading nothing in llama.cpp writes to a model, but for its trained context, which only
// C reads; tokenising and metadata are `const` and keep their working memory on the stack. A context
// only reads the weights.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

impl Drop for Model {
    fn drop(&mut self) {
        self.adapters.clear();
        // SAFETY: `ptr` came from a successful load and is freed once, after its adapters; contexts
        // hold the model by `Arc`.
        unsafe { sys::model_free(self.ptr.as_ptr()) };
    }
}

impl Model {
    /// Loads a GGUF file, or all shards if it is one of several. `progress` gets values from 0 to 1
    /// and stops the load by returning `false`.
    ///
    /// # Errors
    /// [`LlamaError::File`] with llama.cpp's reason: no such file, not a GGUF, an unknown
    /// architecture, no memory, or a model that is no plain decoder. Where llama.cpp asserts that a
    /// file is as it must be, the process ends with one line and status 1.
    pub fn load(
        path: &Path,
        placement: &Placement,
        mut progress: impl FnMut(f32) -> bool,
    ) -> Result<Self, LlamaError> {
        Self::read(path, placement, false, &mut progress)
    }

    /// Reads what a model is without its weights. A [`Context`] of it computes nothing and takes
    /// next to no memory, but knows [what it would take](super::Context::footprint).
    ///
    /// # Errors
    /// As [`load`](Self::load).
    ///
    /// [`Context`]: super::Context
    pub fn outline(path: &Path, placement: &Placement) -> Result<Self, LlamaError> {
        Self::read(path, placement, true, &mut |_| true)
    }

    /// Lets all contexts of this model compute with adapters, which are read now.
    ///
    /// # Errors
    /// [`LlamaError::File`] for one that is no LoRA adapter of this model, or not whole. Where
    /// llama.cpp asserts that a file is as it must be, the process ends with one line and status 1.
    pub fn adapt(&mut self, files: &[AdapterFile]) -> Result<(), LlamaError> {
        let architecture = self.architecture();
        for file in files {
            // SAFETY: a loaded model, which nobody else has: `self` is borrowed alone. It frees its
            // adapters first.
            let adapter = unsafe { Adapter::read(self.ptr, &architecture, file) }?;
            self.adapters.push(adapter);
        }
        Ok(())
    }

    fn read(
        path: &Path,
        placement: &Placement,
        is_outline: bool,
        progress: &mut dyn FnMut(f32) -> bool,
    ) -> Result<Self, LlamaError> {
        start_backend();
        let files = model_files(path)?;
        let path = files[0].as_path();
        let fail =
            |reason: String| LlamaError::File { action: "load", path: path.to_owned(), reason };
        let _loading = Loading::begin(path);
        let header = Gguf::open(path)?;
        check(&header).map_err(fail)?;
        let division = division(placement, &header)?;
        let c_path =
            CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| fail(e.to_string()))?;

        let mut callback: &mut dyn FnMut(f32) -> bool = progress;
        // SAFETY: no arguments; returns a struct by value.
        let mut c = unsafe { sys::model_default_params() };
        let lists = placement.set(&mut c, division.as_ref());
        let draft_layers = placement.draft_layers;
        if is_outline {
            (c.no_alloc, c.load_mode) = (true, sys::LLAMA_LOAD_MODE_NONE);
        }
        c.progress_callback = Some(on_progress);
        c.progress_callback_user_data = (&raw mut callback).cast::<c_void>();
        log::take_errors();
        // SAFETY: the path is zero-terminated; C uses `callback` and `lists` during the call only.
        let ptr = unsafe { sys::model_load_from_file(c_path.as_ptr(), c) };
        drop(lists);
        let ptr = NonNull::new(ptr)
            .ok_or_else(|| fail(log::take_errors().unwrap_or_else(|| "no reason given".into())))?;
        // SAFETY: `ptr` is a loaded model; the vocabulary is a part of it.
        let vocab = unsafe { sys::model_get_vocab(ptr.as_ptr()) };
        let vocab = NonNull::new(vocab.cast_mut())
            .ok_or_else(|| fail("the model has no vocabulary".into()))?;
        let (longest_token, specials) = (OnceLock::new(), OnceLock::new());
        // SAFETY: as above.
        let n_ctx_train = count(unsafe { sys::model_n_ctx_train(ptr.as_ptr()) });
        let adapters = vec![];
        let model = Self {
            ptr,
            vocab,
            files,
            is_outline,
            draft_layers,
            n_ctx_train,
            adapters,
            longest_token,
            specials,
        };
        if let Err(reason) = model.check_kind() {
            let path = model.path().to_owned();
            return Err(LlamaError::File { action: "load", path, reason });
        }
        Ok(model)
    }

    pub(super) fn loads_draft_layers(&self) -> bool {
        self.draft_layers
    }

    /// Whether its files have this matrix.
    pub(super) fn has_tensor(&self, name: &str) -> bool {
        MatrixRows::open(&self.files, &[name]).is_ok()
    }

    /// `true` without weights.
    #[must_use]
    pub fn is_outline(&self) -> bool {
        self.is_outline
    }

    /// The file it was loaded from; of several, the first.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.files[0]
    }

    /// The output matrix in the file, `n_vocab` rows of `n_embd` values.
    ///
    /// # Errors
    /// [`LlamaError::File`] when a file became unreadable.
    pub fn output_rows(&self) -> Result<MatrixRows, LlamaError> {
        // Tied models use their input embeddings.
        MatrixRows::open(&self.files, &["output.weight", "token_embd.weight"])
    }

    /// The input embeddings in the file, `n_vocab` rows of `n_embd` values; errors as above.
    pub fn embedding_rows(&self) -> Result<MatrixRows, LlamaError> {
        MatrixRows::open(&self.files, &["token_embd.weight"])
    }

    /// What it keeps of the tokens that it has read.
    #[must_use]
    pub fn memory(&self) -> Memory {
        // SAFETY: a loaded model; these read flags.
        let has_state = unsafe {
            sys::model_is_recurrent(self.as_ptr()) || sys::model_is_hybrid(self.as_ptr())
        };
        // SAFETY: as above.
        match count(unsafe { sys::model_n_swa(self.as_ptr()) }) {
            _ if has_state => Memory::State,
            0 => Memory::Cells,
            window => Memory::Window(window),
        }
    }

    /// The architecture as the file names it, for example `llama`.
    #[must_use]
    pub fn architecture(&self) -> String {
        self.meta("general.architecture").unwrap_or_default()
    }

    /// Accepts decoders of text.
    fn check_kind(&self) -> Result<(), String> {
        let m = self.ptr.as_ptr();
        // SAFETY: `m` is a loaded model; these read flags.
        let kinds = unsafe {
            [
                (sys::model_has_encoder(m) || !sys::model_has_decoder(m), "an encoder"),
                (sys::model_is_diffusion(m), "a diffusion model"),
                (self.n_vocab() == 0, "a model without a vocabulary"),
            ]
        };
        let Some((_, kind)) = kinds.iter().find(|(is, _)| *is) else { return Ok(()) };
        Err(format!("this is {kind}; only decoders are supported"))
    }

    pub(super) fn adapters(&self) -> &[Adapter] {
        &self.adapters
    }

    pub(super) fn as_ptr(&self) -> *mut sys::llama_model {
        self.ptr.as_ptr()
    }

    /// Number of tokens in the vocabulary.
    #[must_use]
    pub fn n_vocab(&self) -> usize {
        // SAFETY: the vocabulary lives as long as the model.
        count(unsafe { sys::vocab_n_tokens(self.vocab.as_ptr()) })
    }

    /// Number of layers.
    #[must_use]
    pub fn n_layers(&self) -> usize {
        // SAFETY: a loaded model.
        count(unsafe { sys::model_n_layer(self.as_ptr()) })
    }

    /// Width of the hidden state.
    #[must_use]
    pub fn n_embd(&self) -> usize {
        // SAFETY: a loaded model.
        count(unsafe { sys::model_n_embd(self.as_ptr()) })
    }

    /// The longest context the model was trained on, in tokens.
    #[must_use]
    pub fn n_ctx_train(&self) -> usize {
        self.n_ctx_train
    }

    /// The context it was trained on before that was extended, as the file says.
    pub(super) fn n_ctx_before(&self) -> Option<usize> {
        self.number("rope.scaling.original_context_length")
    }

    /// The factor by which its own settings scale the frequencies of positions.
    pub(super) fn rope_freq_scale(&self) -> f32 {
        // SAFETY: a loaded model.
        unsafe { sys::model_rope_freq_scale_train(self.as_ptr()) }
    }

    /// Layers that can go to GPUs, of which the output is one.
    #[must_use]
    pub fn n_offloadable(&self) -> usize {
        self.number("block_count").unwrap_or(0) + 1
    }

    /// A count by its key after the architecture's name.
    fn number(&self, key: &str) -> Option<usize> {
        self.meta(&format!("{}.{key}", self.architecture()))?.parse().ok()
    }

    /// Number of parameters.
    #[must_use]
    pub fn n_params(&self) -> u64 {
        // SAFETY: a loaded model.
        unsafe { sys::model_n_params(self.as_ptr()) }
    }

    /// Size of all tensors in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        // SAFETY: a loaded model.
        unsafe { sys::model_size(self.as_ptr()) }
    }

    /// The quantization of most tensors as llama.cpp names it, for example `Q4_1`.
    #[must_use]
    pub fn quantization(&self) -> String {
        // SAFETY: a loaded model; the name is a constant.
        unsafe { text(sys::ftype_name(sys::model_ftype(self.as_ptr()))) }
    }

    /// The model's name from its metadata, if it has one.
    #[must_use]
    pub fn name(&self) -> Option<String> {
        self.meta("general.name")
    }

    /// A scalar metadata value as text; `None` where the key is absent or holds an array.
    #[must_use]
    pub fn meta(&self, key: &str) -> Option<String> {
        let key = CString::new(key).ok()?;
        let read = |buffer: &mut [u8]| {
            // SAFETY: key is zero-terminated; at most `len` bytes are written, the terminator
            // included.
            unsafe {
                sys::model_meta_val_str(
                    self.as_ptr(),
                    key.as_ptr(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                )
            }
        };
        let n = usize::try_from(read(&mut [0; 1])).ok()?; // the value's length, whatever fits
        let mut buffer = vec![0; n + 1];
        read(&mut buffer);
        buffer.truncate(n);
        Some(String::from_utf8_lossy(&buffer).into_owned())
    }

    /// The source text of the model's default chat template (Jinja), if it has one.
    #[must_use]
    pub fn chat_template(&self) -> Option<String> {
        // SAFETY: null asks for the default template; the text is a part of the model.
        let template = unsafe { sys::model_chat_template(self.as_ptr(), std::ptr::null()) };
        // SAFETY: null or a zero-terminated text that lives as long as the model.
        (!template.is_null()).then(|| unsafe { text(template) })
    }

    /// The token that ends a turn, or a text where turns have none of their own.
    #[must_use]
    pub fn end_token(&self) -> Option<Token> {
        // SAFETY: the vocabulary lives as long as the model; -1 for none.
        let tokens =
            unsafe { [sys::vocab_eot(self.vocab.as_ptr()), sys::vocab_eos(self.vocab.as_ptr())] };
        tokens.into_iter().map(Token).find(|&t| self.contains(t))
    }

    /// The text of the token that begins a text; empty where there is none.
    #[must_use]
    pub fn bos_text(&self) -> String {
        // SAFETY: the vocabulary lives as long as the model; -1 for none.
        self.detokenize(&[Token(unsafe { sys::vocab_bos(self.vocab.as_ptr()) })])
    }

    /// The text of the token that fills up a batch; empty where there is none.
    #[must_use]
    pub fn pad_text(&self) -> String {
        // SAFETY: as above.
        self.detokenize(&[Token(unsafe { sys::vocab_pad(self.vocab.as_ptr()) })])
    }

    /// The text of the token that ends a text; empty where there is none.
    #[must_use]
    pub fn eos_text(&self) -> String {
        // SAFETY: as above.
        self.detokenize(&[Token(unsafe { sys::vocab_eos(self.vocab.as_ptr()) })])
    }

    /// The names of the tokens that only [`tokenize`](Self::tokenize) with `special` finds in a
    /// text: control tokens, and the one for what is unknown.
    #[must_use]
    pub fn control_names(&self) -> Vec<String> {
        let special = sys::LLAMA_TOKEN_ATTR_CONTROL | sys::LLAMA_TOKEN_ATTR_UNKNOWN;
        let mut names = Vec::new();
        for token in 0..i32::try_from(self.n_vocab()).unwrap_or(i32::MAX) {
            // SAFETY: the token is in the vocabulary, which lives as long as the model.
            if unsafe { sys::vocab_get_attr(self.vocab.as_ptr(), token) } & special != 0 {
                names.push(self.detokenize(&[Token(token)]));
            }
        }
        names.retain(|name| !name.is_empty());
        names
    }

    /// Whether [`tokenize`](Self::tokenize) puts the token that begins a text there.
    #[must_use]
    pub fn adds_bos(&self) -> bool {
        // SAFETY: as above.
        unsafe { sys::vocab_get_add_bos(self.vocab.as_ptr()) }
    }

    /// Splits text into tokens. `special`: names of control tokens in the text (`<|im_start|>`)
    /// become those tokens. The beginning-of-sequence token is added where the model asks for it.
    ///
    /// # Errors
    /// As [`tokenize_part`](Self::tokenize_part).
    pub fn tokenize(&self, input: &str, special: bool) -> Result<Vec<Token>, LlamaError> {
        self.tokenize_part(input, true, special)
    }

    /// Splits a part of a text into tokens, the first part if it `begins` the text.
    ///
    /// # Errors
    /// [`LlamaError::Tokenize`] for text over 2 GiB or with more tokens than that.
    pub fn tokenize_part(
        &self,
        input: &str,
        begins: bool,
        special: bool,
    ) -> Result<Vec<Token>, LlamaError> {
        let specials = self.specials.get_or_init(|| self.read_specials());
        // SAFETY: the vocabulary lives as long as the model.
        let ends = begins && unsafe { sys::vocab_get_add_eos(self.vocab.as_ptr()) };
        let pieces = match specials {
            Some(specials) if !ends => specials.cut(input, special),
            _ => vec![input], // a token that ends the text comes with the piece that begins it
        };
        let mut tokens = Vec::new();
        for (i, piece) in pieces.into_iter().enumerate() {
            tokens.extend(self.tokenize_piece(piece, begins && i == 0, special)?);
        }
        Ok(tokens)
    }

    /// The tokens that llama.cpp looks for in a text before it reads what is between.
    fn read_specials(&self) -> Option<Specials> {
        let read = |token| {
            // SAFETY: the token is in the vocabulary; its text lives as long as the model.
            let (attr, text) = unsafe {
                let attr = sys::vocab_get_attr(self.vocab.as_ptr(), token);
                (attr, CStr::from_ptr(sys::vocab_get_text(self.vocab.as_ptr(), token)))
            };
            let control =
                attr & (sys::LLAMA_TOKEN_ATTR_CONTROL | sys::LLAMA_TOKEN_ATTR_UNKNOWN) != 0;
            let is_special = control || attr & sys::LLAMA_TOKEN_ATTR_USER_DEFINED != 0;
            let text = text.to_str().ok().filter(|text| is_special && !text.is_empty())?.to_owned();
            let strips_before = attr & sys::LLAMA_TOKEN_ATTR_LSTRIP != 0;
            let strips_after = attr & sys::LLAMA_TOKEN_ATTR_RSTRIP != 0;
            Some(Special { text, control, strips_before, strips_after })
        };
        Specials::new((0..self.n_vocab() as i32).filter_map(read).collect())
    }

    fn tokenize_piece(
        &self,
        input: &str,
        begins: bool,
        special: bool,
    ) -> Result<Vec<Token>, LlamaError> {
        let error = LlamaError::Tokenize { bytes: input.len() };
        let Ok(len) = i32::try_from(input.len()) else { return Err(error) };
        let mut ids: Vec<sys::token> = Vec::with_capacity(input.len() / 3 + 8);
        let fill = |ids: &mut Vec<sys::token>| {
            let room = i32::try_from(ids.capacity()).unwrap_or(i32::MAX);
            // SAFETY: `len` bytes of text are readable, `room` tokens writable; the text needs no
            // terminator.
            unsafe {
                sys::tokenize(
                    self.vocab.as_ptr(),
                    input.as_ptr().cast::<c_char>(),
                    len,
                    ids.as_mut_ptr(),
                    room,
                    begins,
                    special,
                )
            }
        };
        let mut n = fill(&mut ids);
        if n < 0 && n != i32::MIN {
            ids.reserve(n.unsigned_abs() as usize); // minus the number that was needed
            n = fill(&mut ids);
        }
        let Ok(n) = usize::try_from(n) else { return Err(error) };
        // SAFETY: C wrote `n` tokens, which fit as it did not ask for more.
        unsafe { ids.set_len(n) };
        Ok(ids.into_iter().map(Token).collect())
    }

    /// Appends a token's bytes to `out`. They may be a part of a UTF-8 character. Control tokens
    /// have none unless `special` asks for their names.
    pub fn piece(&self, token: Token, special: bool, out: &mut Vec<u8>) {
        if !self.contains(token) {
            return;
        }
        let read = |buffer: &mut [u8]| {
            let len = i32::try_from(buffer.len()).unwrap_or(i32::MAX);
            // SAFETY: the token is in the vocabulary; at most `len` bytes are written.
            unsafe {
                sys::token_to_piece(
                    self.vocab.as_ptr(),
                    token.0,
                    buffer.as_mut_ptr().cast(),
                    len,
                    0,
                    special,
                )
            }
        };
        let mut buffer = [0; 64];
        match read(&mut buffer) {
            n if n >= 0 => out.extend_from_slice(&buffer[..count(n)]),
            n => {
                let mut long = vec![0; n.unsigned_abs() as usize]; // minus the number that was needed
                let n = read(&mut long);
                long.truncate(count(n));
                out.extend_from_slice(&long);
            }
        }
    }

    /// A token's bytes, as [`piece`](Self::piece) appends them.
    #[must_use]
    pub fn bytes(&self, token: Token, special: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.piece(token, special, &mut bytes);
        bytes
    }

    /// The text of several tokens, control tokens by name.
    #[must_use]
    pub fn detokenize(&self, tokens: &[Token]) -> String {
        let mut bytes = Vec::new();
        tokens.iter().for_each(|&t| self.piece(t, true, &mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Bytes of the longest text that one token stands for; at least 1. Looked up once.
    #[must_use]
    pub fn longest_token(&self) -> usize {
        *self.longest_token.get_or_init(|| {
            let mut bytes = Vec::new();
            let mut length = |token| {
                bytes.clear();
                self.piece(Token(token), true, &mut bytes);
                bytes.len()
            };
            (0..self.n_vocab() as i32).map(&mut length).max().unwrap_or(1).max(1)
        })
    }

    /// `true` for a token of the vocabulary.
    #[must_use]
    pub fn contains(&self, token: Token) -> bool {
        usize::try_from(token.0).is_ok_and(|t| t < self.n_vocab())
    }

    /// `true` for the tokens that end a generation (end of sequence, of turn, of message).
    #[must_use]
    pub fn is_end(&self, token: Token) -> bool {
        // SAFETY: the token is in the vocabulary.
        self.contains(token) && unsafe { sys::vocab_is_eog(self.vocab.as_ptr(), token.0) }
    }
}

/// How a placement's workers and this machine divide a model; connects to them.
fn division(placement: &Placement, header: &Gguf) -> Result<Option<Division>, LlamaError> {
    if placement.workers.is_empty() {
        return Ok(None);
    }
    connect(&placement.workers)?;
    let architecture = header.text("general.architecture").unwrap_or_default();
    let n_layers = header.number(&format!("{architecture}.block_count")).unwrap_or(0);
    divide(&placement.workers, &placement.worker_split, n_layers as usize).map(Some)
}

/// C's counts are `int32_t` and not negative.
fn count(n: i32) -> usize {
    usize::try_from(n).unwrap_or(0)
}

unsafe extern "C" fn on_progress(progress: f32, user_data: *mut c_void) -> bool {
    // SAFETY: `load` passes a pointer to its callback, which outlives the call that invokes this.
    let callback = unsafe { &mut *user_data.cast::<&mut dyn FnMut(f32) -> bool>() };
    callback(progress)
}
