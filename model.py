"""The decoder: a Llama, Mistral, Qwen2 or Qwen3 model in plain PyTorch, loaded, saved and sampled from.

The four families are one architecture with a few switches: a token embedding, then N times (RMSNorm,
attention, RMSNorm, gated MLP), a last RMSNorm and a projection to the vocabulary. Read `Config`, then
`Attention`, `Layer` and `Decoder`, then `generate`.

This file imports nothing of the project, so it can be taken alone. Next to read: prg.py.

SPDX-License-Identifier: MIT
"""
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class CheckpointError(ValueError):
    """A model folder that cannot be used. The message is one sentence: what is wrong, where, what to do."""


def require(fits, message: str):
    if not fits:
        raise CheckpointError(message)


# ---------------------------------------------------------------------------------------------- config

# What config.json may leave out, by family; and what the family's code fixes, whatever config.json says.
DEFAULTS = {"llama": {}, "mistral": dict(num_key_value_heads=8, sliding_window=4096), "qwen2": {},
            "qwen3": dict(head_dim=128)}
FIXED = {"llama": dict(use_sliding_window=False),
         "mistral": dict(use_sliding_window=True, max_window_layers=0, layer_types=None,
                         attention_bias=False, mlp_bias=False),
         "qwen2": dict(attention_bias=False, mlp_bias=False, qkv_bias=True),
         "qwen3": dict(mlp_bias=False, qk_norm=True)}


@dataclass
class Config:
    """The fields of a Hugging Face config.json that change what is computed, under the names used there.

    Raises CheckpointError for values that make no model, or one that this file would not compute exactly.
    """
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # fewer than the heads: grouped-query attention
    head_dim: int | None = None
    model_type: str = "llama"
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on q, k, v and o
    qkv_bias: bool = False  # on q, k and v
    qk_norm: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    rope_parameters: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    sliding_window: int | None = 4096
    use_sliding_window: bool = False
    max_window_layers: int = 28  # the layers below this one see everything
    layer_types: list | None = None  # "full_attention" or "sliding_attention", for each layer
    raw: dict = field(default_factory=dict, repr=False)  # config.json as it was read, to write it back

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            require(is_possible(f.name, f.type, value), f"{f.name} is {value!r}, which is not possible")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        require(self.num_attention_heads % self.num_key_value_heads == 0 and self.head_dim % 2 == 0 < self.head_dim,
                f"{self.num_attention_heads} heads of size {self.head_dim} do not fit: the size must be even, the "
                f"number a multiple of num_key_value_heads {self.num_key_value_heads}")
        require(self.hidden_act == "silu", f"hidden_act {self.hidden_act!r} is not supported, only 'silu'")
        kinds, layers = self.layer_types or [], self.num_hidden_layers
        require({"full_attention", "sliding_attention"}.issuperset(map(str, kinds)) and len(kinds) in (0, layers),
                f"layer_types is not a list of {layers} times 'full_attention' or 'sliding_attention'")

    @property
    def windows(self) -> list[int | None]:
        """How far each layer sees, in tokens, the current one included; None is all the way back."""
        kinds = self.layer_types or ["sliding_attention" if i >= self.max_window_layers else "full_attention"
                                     for i in range(self.num_hidden_layers)]
        return [self.sliding_window if self.use_sliding_window and kind == "sliding_attention" else None
                for kind in kinds]

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        """Read the content of a config.json, in its older or newer spelling."""
        family = raw.get("model_type") if isinstance(raw, dict) else None
        require(isinstance(family, str) and family in FIXED,
                f"model_type {family!r} is not supported, only {', '.join(FIXED)}")
        require(not raw.get("quantization_config"),
                "the weights are quantized; use the checkpoint with the original float weights")
        known = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
        known = {**DEFAULTS[family], **known, **FIXED[family], "rope_parameters": read_rope(raw), "raw": raw}
        for f in fields(cls)[:5]:
            require(f.name in known, f"{f.name} is missing")
        return cls(**known)

    def to_dict(self) -> dict:
        """The content of a config.json that `from_dict` and `transformers` read as this model."""
        made = {k: v for k, v in asdict(self).items() if v is not None and k not in ("raw", "qkv_bias", "qk_norm")}
        return dict(self.raw) or {**made, "architectures": [self.model_type.capitalize() + "ForCausalLM"]}


def is_possible(name: str, kind, value) -> bool:
    """Whether the value is of the type that its field has, and a number of the size that it has in some model."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)  # for Python True is an int
    if not isinstance(value, kind | int if kind is float else kind):
        return False
    least = 0 if kind is float or name == "max_window_layers" else 1
    below = 2**12 if name == "num_hidden_layers" else 2**28
    return not isinstance(value, int | float) or least <= value < below


# ------------------------------------------------------------------------------------------------ RoPE

def read_rope(raw: dict) -> dict:
    """`rope_parameters` of newer files, or `rope_theta` and `rope_scaling` of older ones, as one table."""
    needs = {"default": [], "linear": ["factor"], "yarn": ["factor"],
             "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}
    optional = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    require(isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values()),
            "rope_parameters is not one flat table; tables by layer are not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    require(isinstance(kind, str) and kind in needs, f"rope_type {kind!r} is not supported, only {', '.join(needs)}")
    require(rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) in (None, 1),
            "partial_rotary_factor is not supported: each head must be turned whole")
    trained = (raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
               or raw.get("max_position_embeddings", 2048))
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), **rope, "rope_type": kind,
            "original_max_position_embeddings": trained}
    for name in ["rope_theta", "original_max_position_embeddings", *needs[kind], *filter(rope.get, optional)]:
        require(type(rope.get(name)) in (int, float) and (name == "rope_theta") < rope[name] < 2**40,
                f"RoPE type {kind!r} needs a positive number for {name}, not {rope.get(name)!r}")
    require(kind != "llama3" or rope["low_freq_factor"] < rope["high_freq_factor"],
            "low_freq_factor of rope_parameters is not below high_freq_factor")
    return rope


def rope_frequencies(rope: dict, dim: int, device) -> tuple[Tensor, float]:
    """Angle per position of each pair of a head, [dim/2] in radians, and a factor on cos and sin.

    RoFormer (arXiv 2104.09864); `linear` is position interpolation (2306.15595), `yarn` is 2309.00071,
    `llama3` the scheme of Llama 3.1. All slow the frequencies down to reach longer contexts.
    """
    theta, kind, factor = rope["rope_theta"], rope["rope_type"], rope.get("factor")
    trained = rope.get("original_max_position_embeddings")
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    if kind == "default":
        return frequency, 1.0
    if kind == "linear":
        return frequency / factor, 1.0
    if kind == "llama3":  # keep what turned often within the trained length, slow the rest, blend between
        turns = trained * frequency / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (keep + (1 - keep) / factor), 1.0

    def pair_that_turns(times):  # within the trained length
        return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(theta))
    low = pair_that_turns(rope.get("beta_fast") or 32)
    high = pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)

    def growth(mscale):  # of the attention's temperature
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
    scale = rope.get("attention_factor")
    if scale is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = growth(rope["mscale"]) / growth(rope["mscale_all_dim"])
    return frequency * (1 - slow + slow / factor), growth(1.0) if scale is None else scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + dim/2) of x [B, H, T, dim] by its angle; cos and sin are [B, 1, T, dim/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# --------------------------------------------------------------------------------------------- decoder

class Linear(nn.Linear):
    """torch's own, but for decoding on a CPU: with few rows it is faster to have the big matrix first.

    The result is a transposed view, as good as any to add and multiply, but not to cut into heads.
    """

    def forward(self, x):
        if x.device.type != "cpu" or x.shape[-2] > 1 or torch.is_grad_enabled() or self.bias is not None:
            return super().forward(x)
        return (self.weight @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        d, qkv_bias = c.head_dim, c.attention_bias or c.qkv_bias
        self.head_dim = d
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * d, bias=qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * d, bias=qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * d, bias=qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * d, c.hidden_size, bias=c.attention_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(d, c.rms_norm_eps), nn.RMSNorm(d, c.rms_norm_eps)

    def forward(self, x, cos, sin, mask, attend):
        """x [B, T, hidden] -> the same shape. `attend` as `attention` below, or what a cache makes of it."""
        B, T, _ = x.shape
        q, k, v = (proj(x).reshape(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            exact = self.q_norm.weight.dtype  # float32 under autocast, as all the other norms have it
            q, k = self.q_norm(q.to(exact)), self.k_norm(k.to(exact))
        q, k, v = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin), v.transpose(1, 2)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).reshape(B, T, -1))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[B, H, T, d] of queries [B, H, T, d], keys and values [B, H_kv, T, d]; mask [B or 1, 1, T, T] bool or causal.

    Neighbouring query heads share a key head: grouped-query attention, arXiv 2305.13245.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, mask, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Holds what a checkpoint names `model.*`."""

    def __init__(self, c: Config):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model; its parameters have the names that the checkpoint gives them."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.checkpoint_activations = False  # recompute each layer in backward: less memory, a third more time
        self.eos_ids: tuple[int, ...] = ()  # the tokens that end a text, from generation_config.json
        self.files: dict[str, bytes] = {}  # tokenizer and generation config, carried from load to save
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, position_ids: Tensor = None, attention_mask: Tensor = None) -> Tensor:
        """Logits [B, T, V] of the token that follows each of input_ids [B, T].

        position_ids [B, T] default to 0..T-1. attention_mask [B, 1, T, T] bool says which key (last axis)
        each query may see; without it each token sees itself and all before it.
        """
        return self.lm_head(self.hidden_states(input_ids, position_ids, attention_mask))

    def hidden_states(self, input_ids, position_ids=None, attention_mask=None, attend=None) -> Tensor:
        """What `lm_head` reads, [B, T, hidden]: for callers who need logits at a few positions only.

        `attend(layer, q, k, v, mask)` may stand in for `attention`: see `Cache`.
        """
        T, windows = input_ids.shape[1], self.config.windows
        if position_ids is None:
            position_ids = torch.arange(T, device=input_ids.device)[None]
        masks = {None: attention_mask}
        for window in set(windows) - {None}:
            seen = attention_mask
            if seen is None:
                seen = torch.ones(T, T, dtype=torch.bool, device=input_ids.device).tril()
            masks[window] = seen & (position_ids[:, None, :, None] - position_ids[:, None, None, :] < window)

        x = self.model.embed_tokens(input_ids)
        frequency, scale = rope_frequencies(self.config.rope_parameters, self.config.head_dim, x.device)
        angle = position_ids[:, None, :, None] * frequency
        cos, sin = (angle.cos() * scale).to(x.dtype), (angle.sin() * scale).to(x.dtype)
        for i, (layer, window) in enumerate(zip(self.model.layers, windows)):
            arguments = x, cos, sin, masks[window], partial(attend, i) if attend else attention
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return self.model.norm(x)


# ------------------------------------------------------------------------------------- loading, saving

CARRIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
           "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json")
SHARD_BYTES = 5 * 10**9


def load_pretrained(folder, device="cpu", dtype=torch.float32) -> Decoder:
    """The Decoder of a Hugging Face folder: config.json and safetensors, in one file or shards with an index.

    Weights go straight from the file into the model, one tensor at a time. Raises CheckpointError where the
    folder is incomplete or describes anything that this file does not compute exactly.
    """
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    try:
        config = Config.from_dict(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    with torch.device("meta"):  # shapes only, no memory yet
        model = Decoder(config)

    tensors = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():
                    if not name.endswith("rotary_emb.inv_freq"):  # computed here, from the config
                        tensors[name] = file.get_tensor(name).to(dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors ({error}): download it again") from None
    if config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:  # names what is missing, unexpected or of another shape
        raise CheckpointError(f"{folder}: the weights do not fit config.json ({' '.join(str(error).split()):.400}): "
                              "download it again") from None
    model.tie()

    model.files = {name: (folder / name).read_bytes() for name in CARRIED if (folder / name).is_file()}
    check_vocabulary(folder / "tokenizer.json", config)
    generation = read_json(folder / "generation_config.json") if "generation_config.json" in model.files else {}
    eos = generation.get("eos_token_id") if isinstance(generation, dict) else "unreadable"
    eos = raw.get("eos_token_id") if eos is None else eos
    model.eos_ids = tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
    require(all(type(i) is int and 0 <= i < config.vocab_size for i in model.eos_ids),
            f"{folder}: the eos_token_id of generation_config.json or config.json is {eos!r}, which is not a token id "
            "or a list of them: correct it")
    return model


def read_json(path: Path):
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): give the folder of a checkpoint, or get "
                              "one with 'hf download NAME --local-dir FOLDER'") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download it again") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, all of them there."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        names = ["model.safetensors"]
    else:
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            elsewhere = any(Path(name).name != name for name in names)
        except (KeyError, TypeError, AttributeError):
            elsewhere = True
        require(not elsewhere, f"{index} has no weight_map to files of this folder: download it again")
    for name in names:
        require((folder / name).is_file(),
                f"{folder / name} is missing: give a complete checkpoint in safetensors format")
    return [folder / name for name in names]


def check_vocabulary(path: Path, config: Config):
    """A tokenizer with ids beyond the embedding would fail deep inside, on the first text that uses one."""
    try:
        table = read_json(path) if path.is_file() else {"model": {"vocab": []}}
        vocab, added = table["model"]["vocab"], table.get("added_tokens") or []
        highest = max([len(vocab) - 1, *(vocab.values() if isinstance(vocab, dict) else []), *(t["id"] for t in added)])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path} is not a tokenizer file: download it again") from None
    require(highest < config.vocab_size, f"{path} has token id {highest}, but vocab_size in config.json is "
            f"{config.vocab_size}: the two belong to different models")


def save_pretrained(model: Decoder, folder):
    """Write a folder that `load_pretrained` and `transformers` open; each file appears only when complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, p in model.named_parameters():  # names a tied weight once
        if size and size + p.nbytes > SHARD_BYTES:
            shards, size = shards + [{}], 0
        shards[-1][name], size = p.detach().contiguous(), size + p.nbytes
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards):
        put(folder / name, lambda path: save_file(shard, path, metadata={"format": "pt"}))
    for name, content in model.files.items():
        put(folder / name, lambda path: path.write_bytes(content))
    if len(shards) > 1:
        where = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        total = sum(p.nbytes for p in model.parameters())
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
        put(folder / "model.safetensors.index.json", lambda path: path.write_text(index))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = {k: v for k, v in model.config.to_dict().items() if k != "torch_dtype"}
    put(folder / "config.json", lambda path: path.write_text(json.dumps({**config, "dtype": dtype}, indent=2)))
    for stale in {*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")}:
        if stale.name not in names and (stale.suffix != ".json" or len(shards) == 1):
            stale.unlink()


def put(path: Path, write):
    """Write through a temporary name, so that a crash or a full disk leaves no half file under the real one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors raise when the disk is full
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} could not be written ({reason}): free some space; what was there is untouched") from None
    finally:
        temporary.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------- sampling

FAMILY = 4  # samples of a prompt that attend together; with more, the masked part of their products would grow


class Cache:
    """Keys and values of the tokens so far, in buffers of a fixed size: [families, H_kv, slots, head_dim] a layer.

    A family is some samples of one prompt, its members. Their prompt is held once, aligned at its end with
    the others; after it each step fills one slot for each member. So they attend together: their queries are
    one matrix that meets all of the family's keys, which reads the prompt's once, and a mask keeps each
    member from what the others wrote.
    """

    def __init__(self, config: Config, lengths: Tensor, longest: int, members: int, new: int, like: Tensor):
        self.windows, self.longest, self.members = config.windows, longest, members
        shape = (len(lengths), config.num_key_value_heads, longest + new * members, config.head_dim)
        self.k = [like.new_zeros(shape) for _ in self.windows]
        self.v = [like.new_zeros(shape) for _ in self.windows]
        self.width = shape[2]  # the slots in use; those beyond are not looked at
        place = torch.arange(shape[2], device=like.device) - longest
        self.time = torch.where(place < 0, place, place // members)  # of a slot: new tokens count from 0
        self.owner = torch.where(place < 0, -1, place % members)  # -1: the whole family
        self.filled = place >= -lengths[:, None]  # [families, slots]: not padding

    def mask(self, t: Tensor, window: int | None, groups: int) -> Tensor:
        """What is added to the scores at time t: [families, 1, groups x members, width], 0 for what is seen or -inf."""
        time, owner = self.time[:self.width], self.owner[:self.width]
        seen = (time <= t) & (time > t - window) if window else time <= t
        own = (owner < 0) | (owner == torch.arange(self.members, device=owner.device)[:, None])
        seen = (seen & own & self.filled[:, None, :self.width]).repeat(1, groups, 1)[:, None]
        return torch.zeros_like(seen, dtype=self.k[0].dtype).masked_fill(~seen, -math.inf)

    def prompts(self, families: Tensor):
        """`attend` for prompts [B, T]: as `attention`, and each is kept for all of its families [B, n]."""
        def attend(i, q, k, v, mask):
            here = slice(self.longest - k.shape[2], self.longest)
            self.k[i][families, :, here], self.v[i][families, :, here] = k[:, None], v[:, None]
            return attention(q, k, v, mask)
        return attend

    def step(self, t: Tensor, family: Tensor, member: Tensor):
        """`attend` for the tokens [R, 1] of time t [1]; each row is a member [R] of a family [R]."""
        place, masks = family * self.members + member, {}
        slots = self.longest + t * self.members + torch.arange(self.members, device=t.device)

        def attend(i, q, k, v, _):
            (H, H_kv), window = (q.shape[1], k.shape[1]), self.windows[i]
            if window not in masks:
                masks[window] = self.mask(t, window, H // H_kv)
            # Rows into families; who has left is a member of zeros, at whom nobody looks.
            rows = torch.cat((q, k, v), 1)[:, :, 0]
            members = rows.new_zeros(len(self.filled) * self.members, *rows.shape[1:]).index_copy_(0, place, rows)
            members = members.unflatten(0, (-1, self.members)).transpose(1, 2)  # [families, H + 2 H_kv, members, d]
            q, k, v = members.split((H, H_kv, H_kv), 1)
            self.k[i].index_copy_(2, slots, k)
            self.v[i].index_copy_(2, slots, v)
            out = F.scaled_dot_product_attention(  # heads that share a key head, and members: rows of one matrix
                q.reshape(len(q), H_kv, -1, q.shape[-1]), self.k[i][:, :, :self.width], self.v[i][:, :, :self.width],
                attn_mask=masks[window])
            return out.reshape(q.shape).transpose(1, 2).flatten(0, 1).index_select(0, place)[:, :, None]
        return attend

    def keep(self, families: Tensor):
        """Drop all others: one layer after the other, so that little is ever held twice."""
        for buffers in (self.k, self.v):
            for i in range(len(buffers)):
                buffers[i] = buffers[i][families]
        self.filled = self.filled[families]


@torch.no_grad()
def generate(model: Decoder, prompts: list[list[int]], *, samples_per_prompt: int = 1, max_new_tokens: int,
             temperature: float = 1.0, top_p: float = 1.0, eos_ids=(), seed: int = 0) -> list[list[list[int]]]:
    """Sample continuations: result[prompt][sample] is a list of new token ids, the end token included.

    temperature 0 is greedy; top_p keeps the smallest set of tokens with at least that probability. The tokens
    of a sample depend on (seed, its prompt's ids, its number) alone, so they are the same however the prompts
    are split over calls or ranks; a prompt given twice in a call goes on with new numbers. Raises ValueError
    for an empty prompt or one with ids outside the vocabulary, and for a temperature below 0.
    """
    device, samples = model.lm_head.weight.device, samples_per_prompt
    if not prompts or max_new_tokens < 1 or samples < 1:
        return [[[] for _ in range(samples)] for _ in prompts]
    for i, prompt in enumerate(prompts):
        if not prompt or not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise ValueError(f"prompt {i} is empty or has a token id outside 0..{model.config.vocab_size - 1}")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: give 0 (greedy) or more")

    # Everything that a step touches lies on the device in tensors of a fixed shape.
    rows = torch.arange(len(prompts) * samples, device=device)  # those still in the batch
    lengths = torch.tensor([len(p) for p in prompts], device=device).repeat_interleave(samples)
    u = uniforms(prompts, samples, max_new_tokens, seed).to(device)
    ends = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
    out = torch.full((len(rows), max_new_tokens), -1, device=device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    t = torch.zeros(1, dtype=torch.long, device=device)
    token = torch.zeros(len(rows), dtype=torch.long, device=device)
    # Rows whose probabilities are held at a time: on a CPU few, for memory that is still in its caches.
    at_once = max(1, (2**25 if device.type == "cuda" else 2**19) // model.config.vocab_size)

    def choose(logits):
        parts = zip(logits.split(at_once), u[rows, t].split(at_once))
        token.copy_(torch.cat([draw(part, v, temperature, top_p) for part, v in parts]))
        out[rows, t] = torch.where(done[rows], -1, token)
        done[rows] |= (token[:, None] == ends).any(-1)

    def step():
        hidden = model.hidden_states(token[:, None], (lengths[rows] + t)[:, None],
                                     attend=cache.step(t, family, member))
        t.add_(1)
        choose(model.lm_head(hidden)[:, 0])

    cache, family, member, logits = prefill(model, prompts, samples, max_new_tokens)
    choose(logits)
    replay, bucket = None, 128 if device.type == "cuda" else 1
    for n in range(1, max_new_tokens):
        if len(ends) and n % 16 == 0:  # the only read-back: finished rows leave the batch
            alive = (~done[rows]).nonzero()[:, 0]
            if len(alive) == 0:
                break
            if len(alive) <= 0.8 * len(rows):
                rows, token, member, replay = rows[alive], token[alive], member[alive], None
                families, family = family[alive].unique(return_inverse=True)
                cache.keep(families)
        width = cache.longest + min(max_new_tokens, -(-n // bucket) * bucket) * cache.members
        if width != cache.width or replay is None:  # a new shape; on CUDA captured once and then replayed
            cache.width, replay = width, None  # the old graph's memory is free before the new one takes its own
            replay = capture(step, (t, token, out, done)) if device.type == "cuda" else step
        replay()
    return [[[x for x in row if x >= 0] for row in group]
            for group in out.view(len(prompts), samples, -1).tolist()]


def prefill(model: Decoder, prompts, samples: int, new: int) -> tuple[Cache, Tensor, Tensor, Tensor]:
    """Run each prompt once, with others of like length, for all its samples: rows, [prompts x samples] of them.

    Returns the cache, each row's family and its number as a member there, and the logits of its first token.
    """
    device, vocab_size, longest = model.lm_head.weight.device, model.config.vocab_size, max(map(len, prompts))
    members, each = min(FAMILY, samples), -(-samples // FAMILY)  # families of a prompt
    number = torch.arange(samples, device=device).repeat(len(prompts))
    prompt = torch.arange(len(prompts), device=device).repeat_interleave(samples)
    lengths = torch.tensor([len(p) for p in prompts], device=device).repeat_interleave(each)
    cache = Cache(model.config, lengths, longest, members, new, model.lm_head.weight)
    logits = cache.k[0].new_empty(len(prompts), vocab_size)

    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    tokens_at_once = 2**14 if device.type == "cuda" else 2**9
    while order:
        T = len(prompts[order[0]])  # the longest of the batch; the others are padded on the left
        count = max(1, tokens_at_once // T)
        batch, order = order[:count], order[count:]
        ids = torch.tensor([[0] * (T - len(prompts[i])) + prompts[i] for i in batch], device=device)
        batch = torch.tensor(batch, device=device)
        position = torch.arange(T, device=device) - (T - lengths[batch * each])[:, None]
        key, query = position[:, None, None, :], position[:, None, :, None]
        mask = (key <= query) & ((key >= 0) | (query < 0))  # padding sees padding: no row of a mask is empty
        families = batch[:, None] * each + torch.arange(each, device=device)
        hidden = model.hidden_states(ids, position, mask, cache.prompts(families))
        logits[batch] = model.lm_head(hidden[:, -1:])[:, 0]
    return cache, prompt * each + number // members, number % members, logits[prompt]


def capture(step, state: tuple[Tensor, ...]):
    """Record `step` as a CUDA graph. The warm-up run that capturing needs is undone by restoring `state`."""
    with torch.cuda.device_of(state[0]):
        before, stream = [x.clone() for x in state], torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        for x, y in zip(state, before):
            x.copy_(y)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # whatever other threads do meanwhile
            step()
    return graph.replay


def uniforms(prompts: list[list[int]], samples: int, count: int, seed: int) -> Tensor:
    """One number in [0, 1) for each (prompt, sample, position), [prompts x samples, count], from a hash of
    (seed, the prompt's ids, the sample's number), and so independent of what else is in the batch."""
    seen, generator, rows = {}, torch.Generator(), []
    for prompt in map(tuple, prompts):
        for _ in range(samples):
            number = seen[prompt] = seen.get(prompt, -1) + 1
            key = hashlib.blake2b(repr((seed, prompt, number)).encode(), digest_size=7).digest()
            rows.append(torch.rand(count, generator=generator.manual_seed(int.from_bytes(key, "big"))))
    return torch.stack(rows)


def draw(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """A token for each row of logits [R, V], by inverting the cumulative distribution at u [R] in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    if temperature != 1:
        logits = (logits.float() - logits.amax(-1, keepdim=True)) / temperature  # finite, however cold it is
    p = logits.to(torch.float32, memory_format=torch.contiguous_format).softmax(-1)
    if top_p < 1:
        p = p * (p >= nucleus(p, top_p))
    # Two levels, blocks and then tokens of one block: little to add up, and nothing lost in a long float sum.
    p = F.pad(p, (0, -p.shape[-1] % 256)) if p.shape[-1] % 256 else p
    blocks = p.unflatten(-1, (-1, 256))
    mass = blocks.sum(-1)
    block, rest = invert(mass, u * mass.sum(-1))
    inside = blocks.gather(1, block[:, None, None].expand(-1, 1, 256))[:, 0]
    return block * 256 + invert(inside, rest)[0]


def invert(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of mass [R, N] first exceeds target [R], and what of target is left there."""
    total = mass.cumsum(-1)
    index = torch.minimum((total <= target[:, None]).sum(-1), (total < total[:, -1:]).sum(-1))
    before = (total - mass).gather(1, index[:, None])[:, 0]
    return index, (target - before).clamp(min=0)


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """The largest threshold [R, 1] above which the tokens of p [R, V] still have top_p between them: by
    bisection, which needs no sort of the vocabulary."""
    low, high = torch.zeros_like(p[:, :1]), p.amax(-1, keepdim=True)
    for _ in range(30):
        middle = (low + high) / 2
        enough = (p * (p >= middle)).sum(-1, keepdim=True) >= top_p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low
