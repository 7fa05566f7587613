"""A Llama, Mistral, Qwen2 or Qwen3 decoder in plain PyTorch: the model, checkpoints and sampling.

The four families share one architecture with a few options: a token embedding, N layers of
(RMSNorm, attention, RMSNorm, gated MLP), a final RMSNorm and a projection to the vocabulary. Read
`Config`, then `Attention`, `Layer` and `Decoder`, then `generate`.

This file is self-contained; copy it freely. It is the last to read.

SPDX-License-Identifier: MIT
"""
import contextlib
import hashlib
import json
import math
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A model folder cannot be used. The message says what is wrong, where, and what to do."""


# -----------------------------------------------------------------------------
# config

# Options that a model family fixes in its code. They override config.json.
FAMILIES = {
    "llama": dict(),
    "mistral": dict(attention_bias=False, mlp_bias=False),
    "qwen2": dict(attention_bias=False, mlp_bias=False, qkv_bias=True),
    "qwen3": dict(mlp_bias=False, qk_norm=True),
}


@dataclass
class Config:
    """The fields of a Hugging Face config.json that affect the computation."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: one per query head
    head_dim: int | None = None
    model_type: str = "llama"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    sliding_window: int | None = None  # None: attention to all earlier tokens
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # in the q, k, v and o projections
    qkv_bias: bool = False  # in the q, k and v projections
    qk_norm: bool = False  # RMSNorm of each query and key head
    mlp_bias: bool = False
    initializer_range: float = 0.02
    rope_parameters: dict = field(default_factory=lambda: dict(rope_type="default", rope_theta=1e4))
    raw: dict = field(default_factory=dict, repr=False)  # all of config.json, if it was read

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def context(self) -> int:
        """The longest supported sequence, in tokens. It is never longer than a sliding window, so
        attention does not implement the window."""
        window = self.sliding_window or self.max_position_embeddings
        return min(self.max_position_embeddings, window)

    @classmethod
    def from_dict(cls, raw: dict) -> "Config":
        """Read the content of a config.json, written by any version of transformers.

        Raises CheckpointError for an unsupported option and TypeError for a missing field.
        """
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise CheckpointError(f"model_type {family!r} is not supported")
        if raw.get("quantization_config"):
            raise CheckpointError("quantized weights are not supported")
        if raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"hidden_act {raw['hidden_act']!r} is not supported")
        # New files keep RoPE's settings in rope_parameters, old ones in these two fields.
        rope = {"rope_theta": raw.get("rope_theta", 1e4), **(raw.get("rope_scaling") or {})}
        rope.update(raw.get("rope_parameters") or {})
        rope.setdefault("rope_type", rope.get("type", "default"))  # `type` is the old name
        if rope["rope_type"] not in ("default", "llama3"):
            raise CheckpointError(f"RoPE of type {rope['rope_type']!r} is not supported")
        known = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
        known.update(FAMILIES[family], rope_parameters=rope, raw=raw)
        # Mistral has a sliding window, and Qwen has one if use_sliding_window is true.
        has_window = {"llama": False, "mistral": True}.get(family, raw.get("use_sliding_window"))
        known["sliding_window"] = raw.get("sliding_window", 4096) if has_window else None
        return cls(**known)


# -----------------------------------------------------------------------------
# rotary position embedding

def rope_frequencies(rope: dict, dim: int, device=None) -> Tensor:
    """Return the angle per position, in radians, by which each pair of a head's coordinates is
    rotated, [dim/2] (RoFormer, arXiv 2104.09864)."""
    pairs = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
    frequency = rope["rope_theta"] ** (-pairs / dim)
    if rope["rope_type"] == "default":
        return frequency
    # Llama 3.1 keeps high frequencies, divides low ones by a factor, and interpolates in between.
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / rope["factor"])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of coordinates (i, i + d/2) of x [B, T, H, d] by its position's angle.

    cos and sin are [B, T, 1, d] in float32, because bfloat16 would change large keys. sin is
    negated in the first half of each head.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


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
        """x [B, T, D] -> [B, T, D]. `attend` is `attention` or a method of `Cache`."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if self.qk_norm:
            # Under autocast, compute the norm in float32 like the other norms.
            q = self.q_norm(q.to(self.q_norm.weight.dtype))
            k = self.k_norm(k.to(self.k_norm.weight.dtype))
        q = rotate(q, cos, sin).to(v.dtype).transpose(1, 2)  # [B, H, T, d]
        k = rotate(k, cos, sin).to(v.dtype).transpose(1, 2)  # [B, H_kv, T, d]
        v = v.transpose(1, 2)
        y = attend(q, k, v, mask)  # [B, H, T, d]
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return [B, H, T, d] from queries [B, H, T, d], keys and values [B, H_kv, T, d].

    mask [B or 1, 1, T, T] is True where a query (third axis) may attend to a key (last axis). With
    None, attention is causal. H / H_kv consecutive query heads share a key head (grouped-query
    attention, arXiv 2305.13245).
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


class Decoder(nn.Module):
    """A causal language model. Parameters have the same names as in a Hugging Face checkpoint."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
            norm=nn.RMSNorm(config.hidden_size, config.rms_norm_eps)))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.eos_ids: tuple[int, ...] = ()  # the tokens that end a response
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, position_ids=None, attention_mask=None) -> Tensor:
        """Return the float32 logits [B, T, V] of the token after each of input_ids [B, T].

        position_ids [B, T] default to 0, ..., T-1. attention_mask [B, 1, T, T] is True where a
        query (third axis) may attend to a key (last axis); by default attention is causal. A
        sequence must not be longer than `Config.context`.
        """
        return self.logits(self.hidden_states(input_ids, position_ids, attention_mask))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] of hidden states [..., D], in float32 even under autocast.

        bfloat16 numbers near 20 are 0.125 apart, which is too coarse for log-probabilities.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.lm_head.weight.float())

    def hidden_states(self, input_ids, position_ids=None, attention_mask=None, attend=None):
        """Return the input of `logits`, [B, T, D], for callers that need few of the logits.

        `attend(layer, q, k, v, mask)` replaces `attention`: see `Cache`.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.model.embed_tokens(input_ids)
        frequency = rope_frequencies(self.config.rope_parameters, self.config.head_dim, x.device)
        angle = position_ids[:, :, None, None] * frequency  # [B, T, 1, d/2]
        cos = torch.cat((angle.cos(), angle.cos()), dim=-1)
        sin = torch.cat((-angle.sin(), angle.sin()), dim=-1)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, attention_mask, partial(attend, i) if attend else attention)
        return self.model.norm(x)


# -----------------------------------------------------------------------------
# loading, saving

# Files that save_pretrained copies from the original checkpoint.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
                   "chat_template.jinja")


def load_pretrained(folder, device="cpu", dtype=torch.float32) -> Decoder:
    """Load a Decoder from a Hugging Face folder with config.json and safetensors files.

    Weights are read one tensor at a time and converted to `dtype` on `device`. Raises
    CheckpointError if the folder is incomplete or the model is not supported.
    """
    folder = Path(folder)
    try:
        raw = json.loads((folder / "config.json").read_bytes())
        config = Config.from_dict(raw)
        weights = read_weights(folder, device, dtype)
        if config.tie_word_embeddings:
            # The file may have the shared weight under either name. If it has two different
            # weights, use both in spite of config.json, as transformers does.
            head = weights.get("lm_head.weight")
            embedding = weights.setdefault("model.embed_tokens.weight", head)
            head = weights.setdefault("lm_head.weight", embedding)
            config.tie_word_embeddings = head is embedding or torch.equal(head, embedding)
        with torch.device("meta"):  # allocates no memory
            model = Decoder(config)
        model.load_state_dict(weights, assign=True)
        model.tie()
        eos = read_generation_config(folder).get("eos_token_id")  # an id, a list or None
        if eos is None:
            eos = raw.get("eos_token_id")
        ids = eos if isinstance(eos, list) else [eos]
        model.eos_ids = tuple(i for i in ids if i is not None)
        if not all(i in range(config.vocab_size) for i in model.eos_ids):
            raise CheckpointError(f"eos_token_id is {eos}, outside the vocabulary")
    except (OSError, TypeError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise CheckpointError(
            f"{folder} cannot be loaded ({reason}); it must be a complete Llama, Mistral, Qwen2 or "
            "Qwen3 checkpoint, for example from 'hf download NAME --local-dir FOLDER'") from None
    return model


def read_weights(folder: Path, device, dtype) -> dict[str, Tensor]:
    paths = [folder / "model.safetensors"]
    if not paths[0].is_file():
        paths = sorted(folder.glob("model-*.safetensors")) or paths  # the parts of a large model
    weights = {}
    for path in paths:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():
                # Old files contain RoPE's frequencies, which are computed here instead.
                if not name.endswith("rotary_emb.inv_freq"):
                    weights[name] = file.get_tensor(name).to(dtype)
    return weights


def read_generation_config(folder: Path) -> dict:
    path = folder / "generation_config.json"
    return json.loads(path.read_bytes()) if path.is_file() else {}


def save_pretrained(model: Decoder, folder, source=None):
    """Write a folder that `load_pretrained` and `transformers` can open.

    The tokenizer's files and generation_config.json are copied from the folder `source`, if given.
    Raises OSError or SafetensorError if a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(model.config.raw or asdict(model.config))
    config.pop("raw", None)
    config.pop("torch_dtype", None)  # the old name of dtype
    config["tie_word_embeddings"] = model.config.tie_word_embeddings
    config["dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    generation = {}
    if source is not None:
        generation = read_generation_config(Path(source))
        for name in TOKENIZER_FILES:
            if Path(source, name).is_file():
                shutil.copyfile(Path(source, name), folder / name)
    if model.eos_ids:
        # Other programs must stop at the same tokens; they read either of the two files.
        config["eos_token_id"] = generation["eos_token_id"] = list(model.eos_ids)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))

    # A tied weight occurs only once in named_parameters.
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with contextlib.suppress(OSError):  # safetensors creates files that only their owner can read
        shutil.copymode(folder / "config.json", folder / "model.safetensors")


# -----------------------------------------------------------------------------
# sampling

class Cache:
    """Stores keys and values while S samples of each of Q prompts are drawn.

    A prompt's keys and values are stored once for all its samples: `prompt_k` and `prompt_v`
    [Q, H_kv, P, d], padded on the right to P tokens. Each sample's own tokens are stored in `k` and
    `v` [Q, H_kv, S, N, d], of which the first `width` of N slots are read. There is one tensor for
    each layer. Attention takes one softmax over both parts (bifurcated attention, arXiv
    2403.08845).

    Keys are float32 even if the model is not, to compute attention scores in float32. Keys can be
    large (170 in Qwen2), and scores rounded to bfloat16 would change the output of the model.
    """

    def __init__(self, config: Config, lengths: Tensor, P: int, S: int, N: int, like: Tensor):
        Q = len(lengths)
        H_kv = config.num_key_value_heads
        d = config.head_dim
        self.is_prompt = torch.arange(P, device=like.device) < lengths[:, None]  # [Q, P]
        self.width = 0
        self.prompt_k, self.prompt_v, self.k, self.v = [], [], [], []
        for _ in range(config.num_hidden_layers):
            self.prompt_k.append(like.new_zeros(Q, H_kv, P, d, dtype=torch.float32))
            self.prompt_v.append(like.new_zeros(Q, H_kv, P, d))
            self.k.append(like.new_zeros(Q, H_kv, S, N, d, dtype=torch.float32))
            self.v.append(like.new_zeros(Q, H_kv, S, N, d))

    def fill(self, i: int, q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
        """Store the keys and values of the prompts in layer i, and return their `attention`."""
        self.prompt_k[i].copy_(k)
        self.prompt_v[i].copy_(v)
        return attention(q, k, v, mask)

    def mask(self, slot: Tensor) -> Tensor:
        """Return the additive mask [Q, 1, 1, 1, P + width] for a token stored in `slot`, [1]."""
        is_filled = torch.arange(self.width, device=slot.device) <= slot
        visible = torch.cat((self.is_prompt, is_filled.expand(len(self.is_prompt), -1)), dim=1)
        mask = torch.zeros(visible.shape, device=slot.device).masked_fill(~visible, -math.inf)
        return mask[:, None, None, None]

    def decode(self, slot: Tensor, i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Store one new token of each sample in layer i, and return its attention [Q*S, H, 1, d].

        q is [Q*S, H, 1, d]; k and v are [Q*S, H_kv, 1, d].
        """
        Q, H_kv, P, d = self.prompt_k[i].shape
        S = self.k[i].shape[2]
        new_k = k.view(Q, S, H_kv, 1, d).transpose(1, 2)
        new_v = v.view(Q, S, H_kv, 1, d).transpose(1, 2)
        self.k[i].index_copy_(3, slot, new_k.float())
        self.v[i].index_copy_(3, slot, new_v)
        own_k = self.k[i][:, :, :, :self.width]
        own_v = self.v[i][:, :, :, :self.width]

        # The samples of a prompt share its keys. Merging the axes S and g = H / H_kv gives one
        # matrix product per prompt and key head, which reads them once.
        q = q.view(Q, S, H_kv, -1, d).transpose(1, 2).float()  # [Q, H_kv, S, g, d]
        prompt_scores = q.flatten(2, 3) @ self.prompt_k[i].mT  # [Q, H_kv, S*g, P]
        own_scores = q @ own_k.mT  # [Q, H_kv, S, g, width]
        scores = torch.cat((prompt_scores.unflatten(2, (S, -1)), own_scores), dim=-1)
        # Scale the scores and not q, whose bfloat16 values are exact even in TF32.
        weights = torch.add(mask, scores, alpha=d**-0.5).softmax(-1).to(v.dtype)

        prompt_weights, own_weights = weights.split((P, self.width), dim=-1)
        from_prompt = prompt_weights.flatten(2, 3) @ self.prompt_v[i]  # [Q, H_kv, S*g, d]
        y = from_prompt.unflatten(2, (S, -1)) + own_weights @ own_v  # [Q, H_kv, S, g, d]
        return y.transpose(1, 2).reshape(Q * S, -1, 1, d)

    def keep(self, queries: Tensor, samples: Tensor):
        """Keep the prompts `queries` [Q'] and, of each of them, the samples `samples` [Q', S']."""
        self.is_prompt = self.is_prompt[queries]
        heads = torch.arange(self.k[0].shape[1], device=queries.device)
        kept = (queries[:, None, None], heads[None, :, None], samples[:, None, :])
        for i in range(len(self.k)):  # layer by layer, to need less memory
            self.prompt_k[i] = self.prompt_k[i][queries]
            self.prompt_v[i] = self.prompt_v[i][queries]
            self.k[i] = self.k[i][kept]  # [Q', H_kv, S', N, d]
            self.v[i] = self.v[i][kept]


class Sampler:
    """Holds the state of `generate` on the device.

    All n samples are numbered from 0. The batch holds R = Q * S of them, S samples of each of Q
    prompts, and shrinks when samples finish. `rows` [Q, S] has their numbers. `lengths`, `u`,
    `out`, `total` and `done` have n entries, one for each sample.
    """

    def __init__(self, model: Decoder, prompts, samples: int, new: int, temperature: float,
                 eos_ids, seed, statistic):
        weight = model.lm_head.weight
        n = len(prompts) * samples
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
        self.model = model
        self.head = weight.float()  # [V, D], converted once for all steps
        self.temperature = temperature
        self.statistic = statistic
        self.ends = torch.tensor(sorted(eos_ids), dtype=torch.long, device=weight.device)
        self.cache = Cache(model.config, lengths, max(map(len, prompts)), samples, new, weight)
        self.rows = torch.arange(n, device=weight.device).view(-1, samples)  # [Q, S]
        self.lengths = lengths.repeat_interleave(samples)  # [n], of the prompts
        self.u = uniforms(prompts, samples, new, seed).to(weight.device)  # [n, new]
        self.out = torch.full((n, new), -1, device=weight.device)  # tokens; -1 after the end
        self.total = torch.zeros(n, device=weight.device)  # [n], the sums of the statistic
        self.done = torch.zeros(n, dtype=torch.bool, device=weight.device)
        self.t = torch.zeros(1, dtype=torch.long, device=weight.device)  # number of tokens so far
        self.graph = None  # a decode step as a CUDA graph
        self.graph_shapes = None

    def prefill(self, prompts):
        """Run the prompts through the model, and draw the first tokens."""
        # Attention is causal, so padding on the right does not change the other tokens.
        ids = nn.utils.rnn.pad_sequence(list(map(torch.tensor, prompts)), batch_first=True)
        hidden = self.model.hidden_states(ids.to(self.out.device), attend=self.cache.fill)
        last = self.lengths[self.rows[:, 0]] - 1  # [Q]
        hidden = hidden[torch.arange(len(prompts), device=last.device), last]  # [Q, D]
        logits = F.linear(hidden.float(), self.head)
        self.choose(logits.repeat_interleave(self.rows.shape[1], dim=0))

    def step(self):
        """Run the last tokens of the batch through the model, and draw the next ones.

        The step reads no value from the device, and no shape depends on a value, so that a CUDA
        graph can capture it.
        """
        rows = self.rows.flatten()
        slot = self.t - 1
        token = self.out[rows, slot].clamp(min=0)  # any token, if the sample has ended
        position = self.lengths[rows] + slot
        hidden = self.model.hidden_states(token[:, None], position[:, None],
                                          self.cache.mask(slot), partial(self.cache.decode, slot))
        self.choose(F.linear(hidden[:, 0].float(), self.head))

    def choose(self, logits: Tensor):
        """Draw the next token of each sample in the batch from logits [R, V]."""
        rows = self.rows.flatten()
        running = ~self.done[rows]
        token = draw(logits, self.u[rows, self.t], self.temperature)
        self.out[rows, self.t] = torch.where(running, token, -1)
        if self.statistic is not None:
            self.total[rows] += self.statistic(logits) * running
        self.done[rows] |= (token[:, None] == self.ends).any(-1)
        self.t += 1

    def advance(self):
        """Take one decode step; on a GPU, replay a CUDA graph if one has been captured."""
        if not self.out.is_cuda:
            self.step()
            return
        shapes = (self.rows.shape, self.cache.width)
        if shapes == self.graph_shapes:
            self.graph.replay()
            return
        # Take this step without a graph, as the warm-up that capture needs. Capture does not run
        # the step, so the graph is used from the next step on. Free the old graph's memory first.
        self.graph = None
        stream = side_stream(self.out.device)
        current = torch.cuda.current_stream(self.out.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            self.step()
        current.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.step()
        self.graph_shapes = shapes

    def compact(self, largest: float):
        """Remove finished samples, if at most the fraction `largest` of the batch would be left.

        The batch stays a rectangle [Q, S]. Prompts whose samples have all finished are removed, and
        the others keep as many samples as the prompt with the most running samples has.
        """
        done = self.done[self.rows]  # [Q, S]
        running = (~done).sum(1)  # [Q]
        queries = running.nonzero()[:, 0]  # [Q']
        S = int(running.max())
        if len(queries) * S > largest * done.numel():
            return
        # Put running samples first. CUDA cannot sort booleans before PyTorch 2.6, so sort bytes.
        order = done.byte().sort(dim=1, stable=True).indices
        samples = order[queries, :S]  # [Q', S']
        self.cache.keep(queries, samples)
        self.rows = self.rows[queries[:, None], samples]


@torch.no_grad()
def generate(model: Decoder, prompts: list[list[int]], *, samples_per_prompt: int = 1,
             max_new_tokens: int, temperature: float = 1.0, eos_ids=(), seed=0, statistic=None):
    """Sample continuations of prompts, which are lists of token ids.

    Returns a list of samples for each prompt. A sample is a list of new token ids, up to and
    including the first of `eos_ids`. A temperature below 1e-6 takes the most probable token. A
    sample depends on `seed` (an int, or a tuple of ints and strings), its prompt and its number
    among the samples of that prompt, not on the rest of the batch. If a prompt occurs twice, its
    second set of samples is numbered after the first.

    With statistic(logits [R, V]) -> [R] the result is a pair: the samples, and the mean of the
    statistic over the tokens of each sample, [prompts, samples]. The statistic reads float32
    logits, before the temperature.

    Raises ValueError if a prompt is empty or does not fit in the context with its new tokens, and
    FloatingPointError if the statistic is not finite.
    """
    lengths = [len(prompt) for prompt in prompts]
    longest = model.config.context - max_new_tokens
    if min(lengths) < 1 or max(lengths) > longest:
        raise ValueError(f"prompts have {min(lengths)} to {max(lengths)} tokens, but with "
                         f"{max_new_tokens} new ones the model supports 1 to {longest}")
    s = Sampler(model, prompts, samples_per_prompt, max_new_tokens, temperature, eos_ids, seed,
                statistic)
    s.prefill(prompts)
    # On a GPU, change shapes rarely, since a CUDA graph is captured for each of them.
    bucket, largest = (256, 0.25) if s.out.is_cuda else (1, 0.5)
    for n in range(1, max_new_tokens):  # n tokens of each sample have been drawn
        if n % 16 == 0:
            s.compact(largest)  # between captures, the loop waits for the device only here
        if s.rows.numel() == 0:
            break
        # Read the slots of the n tokens, rounded up to whole buckets.
        s.cache.width = min(max_new_tokens, math.ceil(n / bucket) * bucket)
        s.advance()
    counts = (s.out >= 0).sum(1)  # [n]
    tokens = [row[:count] for row, count in zip(s.out.tolist(), counts.tolist())]
    groups = [tokens[i:i + samples_per_prompt] for i in range(0, len(tokens), samples_per_prompt)]
    if statistic is None:
        return groups
    if not s.total.isfinite().all():
        raise FloatingPointError("the model's logits are not finite: check its weights")
    return groups, (s.total / counts).view(-1, samples_per_prompt)


@cache
def side_stream(device: torch.device):
    """Return the one stream for all captures, because cuBLAS has a workspace for each stream."""
    return torch.cuda.Stream(device)


def uniforms(prompts: list[list[int]], samples: int, new: int, seed) -> Tensor:
    """Return random numbers in [0, 1) for each sample and position, [prompts * samples, new].

    They are hashes of (seed, prompt, number of the sample). A smaller `new` gives the first ones.
    """
    numbered = Counter()  # how many samples of each prompt there are so far
    hashes = bytearray()
    for prompt in map(tuple, prompts):
        for _ in range(samples):
            key = repr((seed, prompt, numbered[prompt])).encode()
            hashes += hashlib.shake_128(key).digest(4 * new)
            numbered[prompt] += 1
    bits = torch.frombuffer(hashes, dtype=torch.int32).view(-1, new)
    return (bits & 0xFFFFFF) * 2.0**-24  # float32 has 24 significant bits


def draw(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Draw a token [R] from each row of logits [R, V].

    The token is the first at which the cumulative probability exceeds the random number u [R].
    """
    if temperature < 1e-6:
        return logits.argmax(-1)
    if temperature != 1:
        logits = logits / temperature
    total = logits.softmax(-1).cumsum_(-1)  # [R, V]; in place, which saves memory and time
    # As u is at most 1 - 2**-24, the target stays below the last sum, even if that is not 1.
    target = u[:, None] * total[:, -1:]
    token = torch.searchsorted(total, target, right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)  # if logits are NaN, the search gives V
