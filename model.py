"""The decoder: a Llama, Mistral, Qwen2 or Qwen3 model in plain PyTorch; loading, saving, sampling.

The four families are one architecture with a few switches: a token embedding, then N times
(RMSNorm, attention, RMSNorm, gated MLP), a last RMSNorm and a projection to the vocabulary. Read
`Config`, then `Attention`, `Layer` and `Decoder`, then `generate`.

This file imports nothing of the project, so it can be taken alone.

SPDX-License-Identifier: MIT
"""
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class CheckpointError(ValueError):
    """A model folder that cannot be used. The message says what is wrong, where, and what to do."""


# -----------------------------------------------------------------------------
# config

# What a family's code fixes, whatever config.json says.
FAMILIES = {
    "llama": dict(),
    "mistral": dict(attention_bias=False, mlp_bias=False),
    "qwen2": dict(attention_bias=False, mlp_bias=False, qkv_bias=True),
    "qwen3": dict(mlp_bias=False, qk_norm=True),
}


@dataclass
class Config:
    """What of a Hugging Face config.json changes the computation, under the names used there."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # fewer than the heads: grouped-query attention
    head_dim: int | None = None
    model_type: str = "llama"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    sliding_window: int | None = None  # None: every token sees all before it
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on q, k, v and o
    qkv_bias: bool = False  # on q, k and v
    qk_norm: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    rope_parameters: dict = field(default_factory=lambda: dict(rope_type="default", rope_theta=1e4))
    raw: dict = field(default_factory=dict, repr=False)  # config.json as read, to write it back

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise CheckpointError(f"{self.num_attention_heads} heads of size {self.head_dim}: the "
                                  "size must be even, and the number a multiple of "
                                  f"num_key_value_heads {self.num_key_value_heads}")

    @property
    def context(self) -> int:
        """The longest sequence that this file computes exactly. Masks and caches know no sliding
        window, and need none while nothing lies further back than the window reaches."""
        window = self.sliding_window or self.max_position_embeddings
        return min(self.max_position_embeddings, window)

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        """Read the content of a config.json, in its older or newer spelling.

        Raises CheckpointError for what this file would not compute exactly, TypeError where a size
        is missing.
        """
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise CheckpointError(f"model_type {family!r} is not one of {', '.join(FAMILIES)}")
        if raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
        if raw.get("quantization_config"):
            raise CheckpointError("the weights are quantized: use those in float")
        known = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
        known.update(FAMILIES[family], rope_parameters=read_rope(raw), raw=raw)
        # Llama has no window, Mistral's is always on, Qwen's where the config says so.
        has_window = {"llama": False, "mistral": True}.get(family, raw.get("use_sliding_window"))
        known["sliding_window"] = raw.get("sliding_window", 4096) if has_window else None
        return cls(**known)

    def to_dict(self) -> dict:
        """The content of a config.json that `from_dict` and `transformers` read as this model."""
        if self.raw:
            return {**self.raw, "tie_word_embeddings": self.tie_word_embeddings}
        made = {k: v for k, v in asdict(self).items() if k not in ("raw", "qkv_bias", "qk_norm")}
        made["use_sliding_window"] = self.sliding_window is not None
        made["architectures"] = [self.model_type.capitalize() + "ForCausalLM"]
        return made


# -----------------------------------------------------------------------------
# rotary position embedding

def read_rope(raw: dict) -> dict:
    """RoPE's settings, in the newer spelling (rope_parameters) or the older."""
    older = {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_scaling") or {})}
    rope = {}
    for table in (raw.get("rope_parameters") or {}, older):
        for name, value in table.items():
            name = "rope_type" if name == "type" else name
            if value is not None and rope.setdefault(name, value) != value:
                raise CheckpointError(f"{name} is {rope[name]} and {value}: remove one of them")
    kind = rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", 1e4)
    if kind not in ("default", "llama3") or any(isinstance(x, dict) for x in rope.values()):
        raise CheckpointError(f"RoPE of type {kind!r}, or that differs by layer, is not supported, "
                              "only 'default' and 'llama3'")
    needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind == "llama3" and not rope.keys() >= set(needed):
        raise CheckpointError(f"RoPE of type llama3 needs {', '.join(needed)}")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1):
        raise CheckpointError("partial_rotary_factor is not supported: a head is turned whole")
    return rope


def rope_frequencies(rope: dict, dim: int, device=None) -> Tensor:
    """Angle per position of each pair of a head, [dim/2], in radians (RoFormer, 2104.09864)."""
    pairs = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    frequency = rope["rope_theta"] ** (-pairs / dim)
    if rope["rope_type"] == "default":
        return frequency
    # Llama 3.1: keep the pairs that turn often within the trained length, slow down those that turn
    # seldom, blend in between.
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / rope["factor"])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + dim/2) of x [B, H, T, dim]; cos and sin are [B, 1, T, dim/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# -----------------------------------------------------------------------------
# decoder

class Attention(nn.Module):

    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        q_size = c.num_attention_heads * c.head_dim
        kv_size = c.num_key_value_heads * c.head_dim
        bias = c.attention_bias or c.qkv_bias
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=bias)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=c.attention_bias)
        self.qk_norm = c.qk_norm
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, attend) -> Tensor:
        """x [B, T, hidden] -> [B, T, hidden]. `attend` is `attention` below, or a cache's own."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.qk_norm:
            # In the weight's type: float32 under autocast, as in all the other norms.
            q = self.q_norm(q.to(self.q_norm.weight.dtype))
            k = self.k_norm(k.to(self.k_norm.weight.dtype))
        q = rotate(q.transpose(1, 2), cos, sin)  # [B, H, T, d]
        k = rotate(k.transpose(1, 2), cos, sin)  # [B, H_kv, T, d]
        v = v.transpose(1, 2)
        y = attend(q, k, v, mask)  # [B, H, T, d]
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[B, H, T, d] from queries [B, H, T, d], keys and values [B, H_kv, T, d].

    mask [B or 1, 1, T, T] bool says which key (last axis) a query may see; None is causal.
    Neighbouring query heads share a key head: grouped-query attention, arXiv 2305.13245.
    """
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class MLP(nn.Module):

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

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
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


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
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Recompute each layer in the backward pass: less memory, a third more time.
        self.checkpoint_activations = False
        # The tokens that end a text, from generation_config.json.
        self.eos_ids: tuple[int, ...] = ()
        # Tokenizer and generation config, carried from load to save.
        self.files: dict[str, bytes] = {}
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, position_ids=None, attention_mask=None) -> Tensor:
        """Logits [B, T, V] of the token that follows each of input_ids [B, T].

        position_ids [B, T] default to 0..T-1; attention_mask [B, 1, T, T] bool says which key (last
        axis) each query may see, by default itself and all before it. Raises ValueError where a
        position lies beyond the model's sliding window, which this file does not compute.
        """
        return self.lm_head(self.hidden_states(input_ids, position_ids, attention_mask))

    def hidden_states(self, input_ids, position_ids=None, attention_mask=None, attend=None):
        """What `lm_head` reads, [B, T, hidden]: for those who need logits at a few positions only.

        `attend(layer, q, k, v, mask)` may stand in for `attention`: see `Cache`.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        window = self.config.sliding_window
        if window and attend is None and position_ids.max() >= window:
            raise ValueError(f"a sequence is longer than the model's sliding window of {window}")

        x = self.model.embed_tokens(input_ids)
        frequency = rope_frequencies(self.config.rope_parameters, self.config.head_dim, x.device)
        angle = position_ids[:, None, :, None] * frequency  # [B, 1, T, d/2]
        cos = angle.cos().to(x.dtype)
        sin = angle.sin().to(x.dtype)
        for i, layer in enumerate(self.model.layers):
            attend_here = partial(attend, i) if attend else attention
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, attention_mask, attend_here,
                               use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, attention_mask, attend_here)
        return self.model.norm(x)


# -----------------------------------------------------------------------------
# loading, saving

CARRIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
           "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
           "chat_template.jinja", "chat_template.json", "generation_config.json")


def load_pretrained(folder, device="cpu", dtype=torch.float32) -> Decoder:
    """The Decoder of a Hugging Face folder: config.json and safetensors, one file or shards with an
    index. Weights go straight from the file into the model, one tensor at a time.

    Raises CheckpointError where the folder is incomplete or describes anything that this file does
    not compute exactly.
    """
    folder = Path(folder)
    raw = read_json(folder / "config.json")
    try:
        config = Config.from_dict(raw)
        with torch.device("meta"):  # shapes only, no memory yet
            model = Decoder(config)
            rope_frequencies(config.rope_parameters, config.head_dim)  # fails if not numbers
    except (TypeError, ValueError, KeyError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"{folder}/config.json cannot be used: {one_line(error)}") from None

    weights = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():
                    # Some files hold RoPE's frequencies, which are computed here.
                    if not name.endswith("rotary_emb.inv_freq"):
                        weights[name] = file.get_tensor(name).to(dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is missing or no safetensors file ({one_line(error)}): "
                                  "download it again") from None
    if config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        embedding = weights["model.embed_tokens.weight"]
        head = weights.setdefault("lm_head.weight", embedding)
        # A file with a head of its own means it, whatever its config says.
        config.tie_word_embeddings = torch.equal(head, embedding)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # it names what is missing, unexpected or of another shape
        raise CheckpointError(f"{folder}: the weights do not fit config.json ({one_line(error)}): "
                              "download it again") from None
    model.tie()
    for name in CARRIED:
        if (folder / name).is_file():
            model.files[name] = (folder / name).read_bytes()
    model.eos_ids = read_eos_ids(folder, raw)
    return model


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is missing or not JSON ({one_line(error)}): give the folder "
                              "of a checkpoint, such as 'hf download NAME --local-dir FOLDER' "
                              "makes") from None
    return content


def one_line(error) -> str:
    return " ".join(str(error).split())[:400]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: one, or those that an index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [folder / "model.safetensors"]
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise CheckpointError(f"{index} has no weight_map: download it again")
    # The name alone: a file of this folder.
    return sorted({folder / Path(str(name)).name for name in names.values()})


def read_eos_ids(folder: Path, raw: dict) -> tuple[int, ...]:
    """The end tokens of generation_config.json or, where it names none, of config.json."""
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.is_file() else None
    if eos is None:
        eos = raw.get("eos_token_id")
    if eos is None:
        return ()
    ids = eos if isinstance(eos, list) else [eos]
    if not all(type(i) is int for i in ids):
        raise CheckpointError(f"{folder}: eos_token_id {eos!r} is not a token id or a list of them")
    return tuple(ids)


def save_pretrained(model: Decoder, folder):
    """Write a folder that `load_pretrained` and `transformers` open; no file is ever half there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # named_parameters names a tied weight once.
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    atomic_write(folder / "model.safetensors",
                 lambda path: save_file(weights, path, metadata={"format": "pt"}))
    config = model.config.to_dict()
    config.pop("torch_dtype", None)  # the older name of dtype
    config["dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    files = dict(model.files)
    if model.eos_ids:
        # Whoever opens the folder must stop where this model learned to stop.
        generation = json.loads(files.get("generation_config.json", b"{}"))
        generation["eos_token_id"] = config["eos_token_id"] = list(model.eos_ids)
        files["generation_config.json"] = json.dumps(generation, indent=2).encode()
    files["config.json"] = json.dumps(config, indent=2).encode()
    for name, content in files.items():
        atomic_write(folder / name, lambda path: path.write_bytes(content))


def atomic_write(path: Path, write):
    """Write through a temporary name, so that a crash leaves no half file under the real one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    write(temporary)
    temporary.chmod(mode)  # safetensors would let the owner alone read
    os.replace(temporary, path)


# -----------------------------------------------------------------------------
# sampling

class Cache:
    """Keys and values while sampling: a prompt's once for all its samples, and each sample's own.

    In each layer `prompt_k` and `prompt_v` [Q, H_kv, P, d] hold Q prompts, padded on the right to P
    tokens; `k` and `v` [Q, H_kv, S, N, d] have N slots for the new tokens of S samples of each; the
    first `width` of them are looked at. One softmax over both parts: bifurcated attention, arXiv
    2403.08845.
    """

    def __init__(self, config: Config, lengths: Tensor, P: int, S: int, N: int, like: Tensor):
        Q, H = len(lengths), config.num_key_value_heads
        self.seen = torch.arange(P, device=like.device) < lengths[:, None]  # [Q, P]: not padding
        self.width = 0
        self.prompt_k, self.prompt_v, self.k, self.v = [], [], [], []  # a tensor for each layer
        for _ in range(config.num_hidden_layers):
            self.prompt_k.append(like.new_zeros(Q, H, P, config.head_dim))
            self.prompt_v.append(like.new_zeros(Q, H, P, config.head_dim))
            self.k.append(like.new_zeros(Q, H, S, N, config.head_dim))
            self.v.append(like.new_zeros(Q, H, S, N, config.head_dim))

    def fill(self, queries: slice, i: int, q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
        """`attend` for some of the prompts: as `attention`, and keys and values are kept."""
        self.prompt_k[i][queries, :, :k.shape[2]] = k
        self.prompt_v[i][queries, :, :k.shape[2]] = v
        return attention(q, k, v, mask)

    def mask(self, slot: Tensor) -> Tensor:
        """Additive attention mask [Q, 1, 1, 1, P + width] of a token that goes into `slot`, [1]."""
        own = torch.arange(self.width, device=slot.device) <= slot
        seen = torch.cat((self.seen, own.expand(len(self.seen), -1)), dim=1)
        mask = torch.zeros_like(seen, dtype=self.k[0].dtype).masked_fill(~seen, -math.inf)
        return mask[:, None, None, None]

    def decode(self, slot: Tensor, i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """`attend` for a new token of each sample: q [Q S, H, 1, d], k and v [Q S, H_kv, 1, d]."""
        Q, H_kv, P, d = self.prompt_k[i].shape
        S = self.k[i].shape[2]
        q = q.view(Q, S, H_kv, -1, d).transpose(1, 2)  # [Q, H_kv, S, g, d], g = H / H_kv
        self.k[i].index_copy_(3, slot, k.view(Q, S, H_kv, 1, d).transpose(1, 2))
        self.v[i].index_copy_(3, slot, v.view(Q, S, H_kv, 1, d).transpose(1, 2))
        own_k = self.k[i][:, :, :, :self.width]
        own_v = self.v[i][:, :, :, :self.width]

        # One product with the prompt's keys for all samples, so that they are read once.
        to_prompt = (q.flatten(2, 3) @ self.prompt_k[i].mT).unflatten(2, (S, -1))  # [.., g, P]
        to_own = q @ own_k.mT  # [Q, H_kv, S, g, width]
        scores = torch.cat((to_prompt, to_own), dim=-1) * d**-0.5 + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        on_prompt, on_own = weights.split((P, self.width), dim=-1)
        y = (on_prompt.flatten(2, 3) @ self.prompt_v[i]).unflatten(2, (S, -1)) + on_own @ own_v
        return y.transpose(1, 2).reshape(Q * S, -1, 1, d)

    def keep(self, queries: Tensor, samples: Tensor):
        """Keep these queries [Q'] and of each these samples [Q', S'], a layer at a time."""
        self.seen = self.seen[queries]
        heads = torch.arange(self.k[0].shape[1], device=queries.device)
        cells = (queries[:, None, None], heads[None, :, None], samples[:, None, :])
        for i in range(len(self.k)):
            self.prompt_k[i] = self.prompt_k[i][queries]
            self.prompt_v[i] = self.prompt_v[i][queries]
            self.k[i] = self.k[i][cells]  # [Q', H_kv, S', N, d]
            self.v[i] = self.v[i][cells]


class Sampler:
    """The state of `generate`, on the device: all that a decode step reads and writes.

    Of n samples in all, R = Q x S are still in the batch: Q queries with S samples each, some of
    which may have finished. rows[q, s] is a sample's number among the n; so `out` has n rows, and
    `token` has R.
    """

    def __init__(self, model: Decoder, prompts, samples: int, new: int, temperature: float,
                 top_p: float, eos_ids, seed, statistic):
        weight = model.lm_head.weight
        n = len(prompts) * samples
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
        self.model = model
        self.temperature = temperature
        self.top_p = top_p
        self.statistic = statistic
        self.ends = torch.tensor(sorted(eos_ids), dtype=torch.long, device=weight.device)
        self.cache = Cache(model.config, lengths, max(map(len, prompts)), samples, new, weight)
        self.rows = torch.arange(n, device=weight.device).view(-1, samples)  # [Q, S] of the n
        self.lengths = lengths.repeat_interleave(samples)  # [n], of the prompts
        self.u = uniforms(prompts, samples, new, seed).to(weight.device)  # [n, new]
        self.out = torch.full((n, new), -1, device=weight.device)  # tokens; -1 after the end
        self.total = torch.zeros(n, device=weight.device)  # [..., n]: the statistic's sum
        self.done = torch.zeros(n, dtype=torch.bool, device=weight.device)
        self.failed = torch.zeros(1, dtype=torch.bool, device=weight.device)  # logits not finite
        self.token = torch.zeros(n, dtype=torch.long, device=weight.device)  # [R], chosen last
        self.t = torch.zeros(1, dtype=torch.long, device=weight.device)  # tokens chosen so far

    def prefill(self, prompts):
        """Run the prompts through the model, a few at a time, and choose the first tokens."""
        device = self.out.device
        tokens = 2**14 if device.type == "cuda" else 2**9
        size = max(1, tokens // max(map(len, prompts)))
        logits = []
        for start in range(0, len(prompts), size):
            piece = [torch.tensor(prompt) for prompt in prompts[start:start + size]]
            last = torch.tensor([len(prompt) - 1 for prompt in piece], device=device)
            # Padding on the right, which no token before it sees.
            ids = nn.utils.rnn.pad_sequence(piece, batch_first=True).to(device)
            fill = partial(self.cache.fill, slice(start, start + len(piece)))
            hidden = self.model.hidden_states(ids, attend=fill)  # [piece, T, D]
            hidden = hidden[torch.arange(len(piece), device=device), last]
            logits.append(self.model.lm_head(hidden))
        logits = torch.cat(logits).repeat_interleave(self.rows.shape[1], dim=0)  # [n, V]
        if self.statistic is not None:
            one = self.statistic(logits[:1].float())  # [..., 1], for its shape
            self.total = one.new_zeros(*one.shape[:-1], len(logits))
        self.choose(logits)

    def step(self):
        """Feed the token chosen last, and choose the next one, of each sample in the batch.

        No value is read from the device and no shape depends on one, so a CUDA graph can hold it.
        """
        slot = self.t - 1
        position = self.lengths[self.rows.flatten()] + slot
        hidden = self.model.hidden_states(self.token[:, None], position[:, None],
                                          self.cache.mask(slot), partial(self.cache.decode, slot))
        self.choose(self.model.lm_head(hidden[:, 0]))

    def choose(self, logits: Tensor):
        """Draw the next token of each sample in the batch from its logits [R, V]."""
        rows = self.rows.flatten()
        running = ~self.done[rows]
        logits = logits.float()
        self.failed |= ~logits.amax(-1).isfinite().all()
        self.token.copy_(draw(logits, self.u[rows, self.t], self.temperature, self.top_p))
        self.out[rows, self.t] = torch.where(running, self.token, -1)
        if self.statistic is not None:
            self.total[..., rows] += self.statistic(logits) * running
        self.done[rows] |= (self.token[:, None] == self.ends).any(-1)
        self.t += 1

    def compact(self) -> bool:
        """Let finished samples leave, if at least half of the batch can; True if they did."""
        done = self.done[self.rows]  # [Q, S]
        queries = (~done).any(1).nonzero()[:, 0]
        # Running samples move to the front; as many stay as the query with the most of them has.
        order = done.sort(dim=1, stable=True).indices
        samples = order[queries, :int((~done).sum(1).max())]
        if samples.numel() > done.numel() / 2:
            return False
        cells = queries[:, None] * done.shape[1] + samples
        self.cache.keep(queries, samples)
        self.rows = self.rows.flatten()[cells]
        self.token = self.token[cells.flatten()]
        return True


@torch.no_grad()
def generate(model: Decoder, prompts: list[list[int]], *, samples_per_prompt: int = 1,
             max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0, eos_ids=(), seed=0,
             statistic=None):
    """Sample continuations: result[prompt][sample] is a list of new ids, the end token included.

    temperature 0 is greedy; top_p keeps the smallest set of tokens with at least that probability,
    and what is as probable as the last of them. A sample's random numbers depend on (seed, its
    prompt's ids, its number) alone, not on what else is in the batch; a prompt given twice in a
    call goes on with new numbers. seed is an int, or a tuple of ints and strings.

    With statistic(logits [R, V]) -> [..., R] the result is a pair: the samples, and the statistic's
    mean over the tokens of each, [..., prompts, samples]. It sees float32 logits, before
    temperature and top_p.

    Raises ValueError for prompts and numbers that make no sense, and for more tokens than the
    model's sliding window; FloatingPointError where logits are not finite.
    """
    check_arguments(model.config, prompts, samples_per_prompt, max_new_tokens, temperature, top_p)
    s = Sampler(model, prompts, samples_per_prompt, max_new_tokens, temperature, top_p, eos_ids,
                seed, statistic)
    s.prefill(prompts)
    on_cuda = s.out.is_cuda
    # The part of the cache that is looked at grows by so many slots; each time a graph is captured.
    bucket = 128 if on_cuda else 1
    step = None
    for n in range(1, max_new_tokens):
        # Between captures the loop waits for values from the device only here, every 16 tokens.
        if n % 16 == 0 and s.compact():
            step = None
        if s.rows.numel() == 0:
            break
        width = min(max_new_tokens, -(-n // bucket) * bucket)
        if step is None or width != s.cache.width:
            s.cache.width = width
            step = None  # an old graph gives its memory back before the new one takes its own
            step = capture(s) if on_cuda else s.step
        step()
    if s.failed:
        raise FloatingPointError("the model's logits are not finite: its weights may be broken")
    counts = (s.out >= 0).sum(1)  # [n]
    tokens = [row[:count] for row, count in zip(s.out.tolist(), counts.tolist())]
    groups = [tokens[i:i + samples_per_prompt] for i in range(0, len(tokens), samples_per_prompt)]
    if statistic is None:
        return groups
    return groups, (s.total / counts).unflatten(-1, (-1, samples_per_prompt))


def check_arguments(config: Config, prompts, samples: int, new: int, temperature, top_p):
    if not prompts or samples < 1 or new < 1:
        raise ValueError("give at least one prompt, one sample a prompt and one new token")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: give 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: give more than 0 and at most 1")
    for prompt in prompts:
        if not prompt or min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError("a prompt is empty or has a token id outside the vocabulary of "
                             f"{config.vocab_size}")
        if config.sliding_window and len(prompt) + new > config.sliding_window:
            raise ValueError(f"a prompt of {len(prompt)} and {new} new tokens are longer than the "
                             f"model's sliding window of {config.sliding_window}")


@cache
def side_stream(device: torch.device):
    """One for all captures, since cuBLAS keeps a workspace for every stream."""
    return torch.cuda.Stream(device)


def capture(s: Sampler):
    """Record a decode step as a CUDA graph, and return what replays it."""
    stream = side_stream(s.out.device)
    # Capturing needs a warm-up run. Its effects are undone by putting the state back; what it put
    # into the cache the first replay writes again.
    state = (s.token, s.t, s.out, s.total, s.done, s.failed)
    before = [x.clone() for x in state]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        s.step()
    torch.cuda.current_stream().wait_stream(stream)
    for x, y in zip(state, before):
        x.copy_(y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        s.step()
    return graph.replay


def uniforms(prompts: list[list[int]], samples: int, new: int, seed) -> Tensor:
    """A number in [0, 1) for each sample and position, [prompts x samples, new], from a hash of
    (seed, the prompt's ids, the sample's number), and so independent of the rest of the batch."""
    numbers = {}  # of samples given to a prompt so far
    generator = torch.Generator()
    rows = []
    for prompt in map(tuple, prompts):
        for _ in range(samples):
            number = numbers.get(prompt, 0)
            numbers[prompt] = number + 1
            key = hashlib.blake2b(repr((seed, prompt, number)).encode(), digest_size=7).digest()
            generator.manual_seed(int.from_bytes(key, "big"))
            rows.append(torch.rand(new, generator=generator))
    return torch.stack(rows)


def draw(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """A token for each row of logits [R, V], by inverting the cumulative distribution at u [R]."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    if temperature != 1:
        # Less the largest, so that a division by a small number stays finite.
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    p = logits.softmax(-1)
    if top_p < 1:
        ordered = p.sort(-1, descending=True).values
        in_nucleus = ordered.cumsum(-1) - ordered < max(top_p, 1e-9)
        p = p * (p >= ordered.masked_fill(~in_nucleus, 1).amin(-1, keepdim=True))
    # Two levels, a block of tokens and then one of its tokens: a running sum over the whole
    # vocabulary is slow on a CPU, and loses digits on its way.
    blocks = p.unflatten(-1, (-1, math.gcd(p.shape[-1], 256)))  # [R, V / size, size]
    mass = blocks.sum(-1)
    block, rest = invert(mass, u * mass.sum(-1))
    inside = blocks[torch.arange(len(block), device=block.device), block]  # [R, size]
    token, _ = invert(inside, rest)
    return block * blocks.shape[-1] + token


def invert(mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of mass [R, N] first exceeds target [R], and what of target is left."""
    total = mass.cumsum(-1)
    index = (total <= target[:, None]).sum(-1)
    # Rounding may put the target past the end: take the last entry that has any mass.
    index = torch.minimum(index, (total < total[:, -1:]).sum(-1))
    before = (total - mass).gather(1, index[:, None])[:, 0]
    return index, (target - before).clamp(min=0)
