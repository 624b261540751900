//! Arguments of all commands that load a model, about where its weights go and how it reads positions.

use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail, ensure};
use clap::Args as ClapArgs;
use clap::builder::BoolishValueParser;

use super::values::{between, layers, number};
use super::{HeadsSource, ModelArgs};
use crate::llama::{
    AdapterFile, Buffer, Endpoint, GpuLayers, LoadMode, MOST_WORKERS, Numa, Override, Pattern,
    Placement, Rope, RopeScaling, SplitMode, max_devices,
};

/// Where a model's weights go.
#[derive(Clone, Debug, ClapArgs)]
pub struct PlacementArgs {
    /// Layers to offload to GPUs, a number, `all`, or `auto`: as many as fit; also -ngl. A CPU build
    /// ignores it
    #[arg(long, visible_alias = "gpu-layers", env = "N_GPU_LAYERS", default_value = "25", value_parser = layers)]
    pub n_gpu_layers: GpuLayers,
    /// How several GPUs share the model; also -sm
    #[arg(long = "split-mode", env = "SPLIT_MODE", default_value = "layer")]
    pub split: SplitMode,
    /// Share of each GPU, such as 3,1; also -ts [default: by the memory that each has free]
    #[arg(long, env = "TENSOR_SPLIT", value_delimiter = ',', value_parser = number(0.0, 1e6))]
    pub tensor_split: Vec<f32>,
    /// Index of the GPU that has the whole model with SPLIT_MODE none, and small tensors with row;
    /// also -mg
    #[arg(long, env = "MAIN_GPU", default_value_t = 0)]
    pub main_gpu: u16,
    /// Keep the weights of all experts in the host's memory; also -cmoe
    #[arg(long, env = "CPU_MOE", value_parser = BoolishValueParser::new())]
    pub cpu_moe: bool,
    /// First layers whose experts' weights stay in the host's memory; also -ncmoe
    #[arg(long, env = "N_CPU_MOE", default_value_t = 0, value_parser = between(0, MOST_LAYERS))]
    pub n_cpu_moe: usize,
    /// Buffer of the tensors whose names a pattern matches, PATTERN=BUFFER, such as
    /// `ffn_up=CPU`; repeat it, or separate several by commas; also -ot [default: none]
    #[arg(long = "override-tensor", env = "OVERRIDE_TENSOR", value_name = "OVERRIDE_TENSOR", value_delimiter = ',', value_parser = tensors)]
    pub overrides: Vec<Override>,
    /// Workers that compute layers of the model, HOST:PORT, at most two: each a `medusa-llama worker` of
    /// the same version. N_GPU_LAYERS and what shares it among GPUs then count for nothing [default: none]
    #[arg(long, env = "RPC", value_name = "HOST:PORT", value_delimiter = ',')]
    pub rpc: Vec<Endpoint>,
    /// Share of the layers of each worker, and at last of this machine, such as 2,1,1 [default: by the
    /// memory of each; of GPUs by what is free]
    #[arg(long, env = "RPC_SPLIT", value_name = "RPC_SPLIT", value_delimiter = ',', value_parser = number(0.0, 1e6))]
    pub rpc_split: Vec<f32>,
    /// Leave the weights as the file has them, instead of arranging them for the CPU's kernels: slower
    /// with several rows. Workers always do
    #[arg(long, env = "NO_REPACK", value_parser = BoolishValueParser::new())]
    pub no_repack: bool,
    /// Map the model's file into memory [default: unless a device needs a copy, or MLOCK is set]
    #[arg(long, env = "MMAP", value_parser = BoolishValueParser::new())]
    pub mmap: bool,
    /// Copy the model into memory instead
    #[arg(long, env = "NO_MMAP", value_parser = BoolishValueParser::new())]
    pub no_mmap: bool,
    /// Keep the model in memory: the system must not swap it out
    #[arg(long, env = "MLOCK", value_parser = BoolishValueParser::new())]
    pub mlock: bool,
    /// How threads and memory are spread over the machine's NUMA nodes [default: as the system does]
    #[arg(long, env = "NUMA")]
    pub numa: Option<Numa>,
    /// LoRA adapter to apply, a GGUF file for this model; repeat it, or separate several by commas
    /// [default: none]
    #[arg(long, env = "LORA", value_name = "FILE", value_delimiter = ',')]
    pub lora: Vec<PathBuf>,
    /// The same with a scale, FILE:SCALE [default: none]
    #[arg(long, env = "LORA_SCALED", value_name = "FILE:SCALE", value_delimiter = ',', value_parser = scaled)]
    pub lora_scaled: Vec<AdapterFile>,
}

/// How positions are rotated. 0 is the model's own value, as llama-server has it.
#[derive(Clone, Debug, ClapArgs)]
pub struct RopeArgs {
    /// How the context is extended beyond the training's [default: as the GGUF says, else linear]
    #[arg(long = "rope-scaling", env = "ROPE_SCALING", value_name = "ROPE_SCALING")]
    pub scaling: Option<RopeScaling>,
    /// Extend the context by this factor: 1 / ROPE_FREQ_SCALE [default: as the GGUF says]
    #[arg(long = "rope-scale", env = "ROPE_SCALE", value_name = "ROPE_SCALE", value_parser = number(0.0, MOST_SCALE))]
    pub scale: Option<f32>,
    /// Base of the frequencies [default: as the GGUF says]
    #[arg(long = "rope-freq-base", env = "ROPE_FREQ_BASE", value_name = "ROPE_FREQ_BASE", value_parser = number(0.0, 1e12))]
    pub freq_base: Option<f32>,
    /// Factor of the frequencies; 0.5 is for twice the context [default: as the GGUF says]
    #[arg(long = "rope-freq-scale", env = "ROPE_FREQ_SCALE", value_name = "ROPE_FREQ_SCALE", value_parser = number(0.0, MOST_SCALE))]
    pub freq_scale: Option<f32>,
    /// YaRN: context that the model was trained for before it is extended, in tokens [default: as the
    /// GGUF says]
    #[arg(long, env = "YARN_ORIG_CTX", value_parser = between(0, 1 << 30))]
    pub yarn_orig_ctx: Option<usize>,
    /// YaRN: share of extrapolation; 0 interpolates alone, -1 is as the GGUF says [default: as the
    /// GGUF says, else 1]
    #[arg(long, env = "YARN_EXT_FACTOR", allow_negative_numbers = true, value_parser = number(-1.0, 1e6))]
    pub yarn_ext_factor: Option<f32>,
    /// YaRN: factor of the attention's magnitude; -1 is as the GGUF says [default: as the GGUF says]
    #[arg(long, env = "YARN_ATTN_FACTOR", allow_negative_numbers = true, value_parser = number(-1.0, 1e6))]
    pub yarn_attn_factor: Option<f32>,
    /// YaRN: rotations over the original context below which a dimension is interpolated; -1 is as
    /// the GGUF says [default: as the GGUF says, else 1]
    #[arg(long, env = "YARN_BETA_SLOW", allow_negative_numbers = true, value_parser = number(-1.0, 1e6))]
    pub yarn_beta_slow: Option<f32>,
    /// YaRN: rotations over the original context above which a dimension stays as it is; -1 is as
    /// the GGUF says [default: as the GGUF says, else 32]
    #[arg(long, env = "YARN_BETA_FAST", allow_negative_numbers = true, value_parser = number(-1.0, 1e6))]
    pub yarn_beta_fast: Option<f32>,
}

/// More layers than any model has.
const MOST_LAYERS: usize = 512;
/// The largest factor of a context or of frequencies.
const MOST_SCALE: f32 = 1e6;
/// What `config.json` of heads has as `true` if they were trained with adapters.
const FOR_ADAPTERS: &str = "lora";

impl PlacementArgs {
    /// Checks values against each other. An error names the variables.
    pub(super) fn placement(&self) -> anyhow::Result<Placement> {
        ensure!(
            !(self.mmap && self.no_mmap),
            "MMAP and NO_MMAP are both set: the model is mapped, or else it is copied"
        );
        let (n, most) = (self.tensor_split.len(), max_devices());
        ensure!(n <= most, "TENSOR_SPLIT has {n} shares; at most {most} devices can have one");
        self.check_workers()?;
        let of_experts =
            |layer| Override { pattern: Pattern::of_experts(layer), buffer: Buffer::host() };
        let mut overrides = self.overrides.clone();
        overrides.extend(self.cpu_moe.then(|| of_experts(None)));
        overrides.extend((0..self.n_cpu_moe as u32).map(|layer| of_experts(Some(layer))));
        Ok(Placement {
            n_gpu_layers: self.n_gpu_layers,
            split: self.split,
            main_gpu: self.main_gpu,
            tensor_split: self.tensor_split.clone(),
            overrides,
            workers: self.rpc.clone(),
            worker_split: self.rpc_split.clone(),
            no_repack: self.no_repack,
            draft_layers: false, // whoever drafts decides
            load: match (self.mmap, self.no_mmap) {
                (_, true) => LoadMode::Copied,
                (true, false) => LoadMode::Mapped,
                (false, false) => LoadMode::Auto,
            },
            lock: self.mlock,
        })
    }

    /// Checks what is said of workers.
    fn check_workers(&self) -> anyhow::Result<()> {
        let (n, n_shares) = (self.rpc.len(), self.rpc_split.len());
        ensure!(
            n <= MOST_WORKERS,
            "RPC names {n} workers, and at most {MOST_WORKERS} work: with more, ggml hangs (llama.cpp's issue 28487)"
        );
        let twice = self.rpc.iter().enumerate().find(|(i, of)| self.rpc[..*i].contains(of));
        if let Some((_, worker)) = twice {
            bail!("RPC names the worker {worker} twice");
        }
        ensure!(
            n_shares == 0 || n_shares == n + 1,
            "RPC_SPLIT has {n_shares} shares; it needs {}, of {n} workers and of this machine",
            n + 1
        );
        ensure!(
            n == 0 || (self.split == SplitMode::Layer && self.tensor_split.is_empty()),
            "RPC divides the model by layers: leave SPLIT_MODE and TENSOR_SPLIT unset, and see RPC_SPLIT"
        );
        Ok(())
    }

    /// All adapters.
    pub(super) fn adapters(&self) -> Vec<AdapterFile> {
        let whole = self.lora.iter().map(|path| AdapterFile { path: path.clone(), scale: 1.0 });
        whole.chain(self.lora_scaled.iter().cloned()).collect()
    }
}

impl RopeArgs {
    /// Checks values against each other. An error names the variables.
    pub(super) fn rope(&self) -> anyhow::Result<Rope> {
        let named = |value: Option<f32>| value.filter(|&value| value != 0.0);
        let (scale, freq_scale) = (named(self.scale), named(self.freq_scale));
        if let (Some(scale), Some(freq_scale)) = (scale, freq_scale) {
            return Err(anyhow!(
                "ROPE_SCALE is {scale} and ROPE_FREQ_SCALE is {freq_scale}: one is 1 / the other, give one"
            ));
        }
        let or_own = |value: Option<f32>| value.filter(|&value| value >= 0.0);
        Ok(Rope {
            scaling: self.scaling,
            freq_base: named(self.freq_base),
            freq_scale: freq_scale.or(scale.map(f32::recip)),
            yarn_orig_ctx: self.yarn_orig_ctx.filter(|&n| n > 0).map(|n| n as u32),
            yarn_ext_factor: or_own(self.yarn_ext_factor),
            yarn_attn_factor: or_own(self.yarn_attn_factor),
            yarn_beta_slow: or_own(self.yarn_beta_slow),
            yarn_beta_fast: or_own(self.yarn_beta_fast),
        })
    }
}

impl ModelArgs {
    /// The heads, unless they were trained for the model without its adapters.
    pub(super) fn fitting(&self, heads: HeadsSource, are_named: bool) -> Option<HeadsSource> {
        if self.placement.adapters().is_empty() || are_for_adapters(&heads) {
            return Some(heads);
        }
        if are_named {
            tracing::warn!(
                "heads are off: they were trained without the adapters of LORA and LORA_SCALED; heads that fit have \"{FOR_ADAPTERS}\": true in the config.json of a local folder"
            );
        } else {
            tracing::info!("heads are off: they were trained without the adapters");
        }
        None
    }
}

/// Whether heads say that they were trained with adapters.
fn are_for_adapters(heads: &HeadsSource) -> bool {
    let HeadsSource::Folder(folder) = heads else { return false };
    let config = std::fs::read(folder.join("config.json")).unwrap_or_default();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap_or_default();
    config[FOR_ADAPTERS] == true
}

fn tensors(text: &str) -> Result<Override, String> {
    // A pattern may contain the sign: (?=x).
    let (pattern, buffer) = text.rsplit_once('=').ok_or("must be PATTERN=BUFFER")?;
    let pattern =
        Pattern::new(pattern).map_err(|why| format!("the pattern {pattern} is invalid: {why}"))?;
    Ok(Override { pattern, buffer: Buffer::by_name(buffer)? })
}

fn scaled(text: &str) -> Result<AdapterFile, String> {
    let (path, scale) = text.rsplit_once(':').ok_or("must be FILE:SCALE")?;
    let scale = scale.parse().ok().filter(|scale: &f32| scale.is_finite());
    let scale = scale.ok_or_else(|| format!("the scale of {path} must be a number"))?;
    Ok(AdapterFile { path: Path::new(path).to_owned(), scale })
}

#[cfg(test)]
mod tests {
    use super::super::{Args, Command, ServeArgs};
    use super::*;

    fn read(args: &[&str]) -> Result<ServeArgs, String> {
        let all = ["medusa-llama", "serve", "-m", "x"].iter().chain(args).map(Into::into);
        match Args::read(all).map_err(|error| error.to_string())?.command {
            Command::Serve(args) => Ok(*args),
            _ => unreachable!("`serve` was given"),
        }
    }

    fn placement(args: &[&str]) -> Result<Placement, String> {
        read(args)?.engine.model.placement.placement().map_err(|error| error.to_string())
    }

    fn rope(args: &[&str]) -> Result<Rope, String> {
        read(args)?.engine.model.rope.rope().map_err(|error| error.to_string())
    }

    #[test]
    fn layers_are_a_number_all_or_auto() {
        let layers = |args: &[&str]| placement(args).map(|of| of.n_gpu_layers);
        assert_eq!(layers(&[]), Ok(GpuLayers::Most(25)));
        for flag in ["-ngl", "--n-gpu-layers", "--gpu-layers"] {
            assert_eq!(layers(&[flag, "7"]), Ok(GpuLayers::Most(7)));
        }
        assert_eq!(layers(&["-ngl", "all"]), Ok(GpuLayers::ALL));
        assert_eq!(layers(&["-ngl", "auto"]), Ok(GpuLayers::Auto));
        let text = layers(&["-ngl", "many"]).unwrap_err();
        assert!(text.contains("N_GPU_LAYERS") && text.contains("auto"), "{text}");
    }

    #[test]
    fn several_gpus_have_shares_of_a_model() {
        let of = placement(&["-sm", "row", "-mg", "2", "-ts", "3,1.5"]).unwrap();
        assert_eq!((of.split, of.main_gpu, of.tensor_split), (SplitMode::Row, 2, vec![3.0, 1.5]));
        let many = vec!["1"; max_devices() + 1].join(",");
        for (args, name) in [
            (["-sm", "column"], "--split-mode"),
            (["-mg", "-1"], "'-1'"),
            (["-ts", "1,nan"], "TENSOR_SPLIT"),
            (["-ts", &many], "TENSOR_SPLIT has"),
        ] {
            let text = placement(&args).unwrap_err();
            assert!(text.contains(name), "{text}");
        }
    }

    #[test]
    fn tensors_go_where_a_pattern_says() {
        let of = placement(&["-ot", "a=CPU,b(?=c)=CPU", "-cmoe", "-ncmoe", "2"]).unwrap();
        let patterns = [
            Pattern::new("a").unwrap(),
            Pattern::new("b(?=c)").unwrap(),
            Pattern::of_experts(None),
            Pattern::of_experts(Some(0)),
            Pattern::of_experts(Some(1)),
        ];
        assert_eq!(of.overrides.iter().map(|o| o.pattern.clone()).collect::<Vec<_>>(), patterns);
        for (value, name) in
            [("a=HERE", "there is CPU"), ("a", "PATTERN=BUFFER"), ("(=CPU", "the pattern ( is")]
        {
            let text = placement(&["-ot", value]).unwrap_err();
            assert!(text.contains(name) && text.contains("OVERRIDE_TENSOR"), "{text}");
        }
    }

    #[test]
    fn a_file_is_mapped_or_copied() {
        let load = |args: &[&str]| placement(args).map(|of| (of.load, of.lock));
        assert_eq!(load(&[]), Ok((LoadMode::Auto, false)));
        assert_eq!(load(&["--mmap"]), Ok((LoadMode::Mapped, false)));
        assert_eq!(load(&["--no-mmap", "--mlock"]), Ok((LoadMode::Copied, true)));
        let text = load(&["--mmap", "--no-mmap"]).unwrap_err();
        assert!(text.contains("NO_MMAP"), "{text}");
    }

    #[test]
    fn adapters_have_scales() {
        let args = read(&["--lora", "a,b", "--lora", "c", "--lora-scaled", "d:e:-0.5"]).unwrap();
        let of = |path: &str, scale| AdapterFile { path: path.into(), scale };
        let all = [of("a", 1.0), of("b", 1.0), of("c", 1.0), of("d:e", -0.5)];
        assert_eq!(args.engine.model.placement.adapters(), all);
        for bad in ["a", "a:", "a:nan", "a:x"] {
            let text = read(&["--lora-scaled", bad]).unwrap_err();
            assert!(text.contains("FILE:SCALE"), "{text}");
        }
    }

    #[test]
    fn heads_are_off_with_adapters_unless_they_fit() {
        let folder = tempfile::tempdir().unwrap();
        let name = folder.path().to_str().unwrap();
        let heads = |args: &[&str]| {
            let args = read(args).unwrap();
            args.engine.drafts.source(&args.engine.model).unwrap()
        };
        let with = ["--heads", name, "--lora", "a"];
        assert!(heads(&with[..2]).is_some());
        assert_eq!(heads(&with), None);
        std::fs::write(folder.path().join("config.json"), r#"{ "lora": true }"#).unwrap();
        assert!(heads(&with).is_some());
    }

    #[test]
    fn rotations_are_the_models_unless_they_are_named() {
        assert_eq!(rope(&[]), Ok(Rope::default()));
        let own = ["--rope-freq-base", "0", "--yarn-orig-ctx", "0", "--yarn-beta-fast", "-1"];
        assert_eq!(rope(&own), Ok(Rope::default()));
        let named = ["--rope-scaling", "yarn", "--rope-scale", "4", "--yarn-orig-ctx", "4096"];
        let expected = Rope {
            scaling: Some(RopeScaling::Yarn),
            freq_scale: Some(0.25),
            yarn_orig_ctx: Some(4096),
            ..Rope::default()
        };
        assert_eq!(rope(&named), Ok(expected));
        for (args, name) in [
            (&["--rope-scale", "-1"][..], "'-1'"),
            (&["--rope-freq-base", "x"], "ROPE_FREQ_BASE"),
            (&["--rope-scaling", "ntk"], "ROPE_SCALING"),
            (&["--yarn-ext-factor", "-2"], "YARN_EXT_FACTOR"),
            (&["--rope-scale", "2", "--rope-freq-scale", "0.5"], "ROPE_SCALE is 2"),
        ] {
            let text = rope(args).unwrap_err();
            assert!(text.contains(name), "{text}");
        }
    }
}
