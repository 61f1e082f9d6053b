"""Images and captions to unit-norm embeddings, globally and token by token.

Shapes: N samples, d embedding width, P spatial positions, L tokens. Whatever precision the towers run in, embeddings
are normalised and returned in float32. The towers run once, tokens or not.

Token sets (the sets of OTCCLIP and of every local matching method):
image   ResNet: each spatial position through the attention pool's value and output projections, position embedding
        included, so that a pool attending to one position only would return exactly that token.
        ViT: each patch through `ln_post` and the projection of the class token.
text    each token through the final norm and the text projection; the mask leaves out the start token and the padding
        and keeps the end token, so no set is ever empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.torchvision_door import open_clip

Encoded = tuple[Tensor, Tensor | None, Tensor | None]


def encode_image(model: nn.Module, pixels: Tensor, tokens: bool = False) -> Encoded:
    """Embeddings of images (N, 3, H, W), already normalised by `clip.normalise`.

    Returns pooled (N, d), equal to `model.encode_image(pixels, normalize=True)`; image tokens (N, P, d) and their mask
    (N, P), all True; or None for both unless `tokens`. Everything is unit norm, float32.
    Raises ValueError for image tokens of a tower other than open_clip's ResNets and ViTs without attentional pooling.
    """
    visual: Any = model.visual
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        features = visual.forward_intermediates(pixels, indices=1, intermediates_only=True)["image_intermediates"][-1]
        pooled, local = _attention_pool(visual.attnpool, features, tokens)
    elif not tokens:
        pooled, local = _unnormalised(model, "encode_image", pixels), None
    elif isinstance(visual, open_clip.transformer.VisionTransformer) and visual.attn_pool is None:
        out = visual.forward_intermediates(pixels, indices=1, normalize_intermediates=True, output_fmt="NLC")
        pooled, local = out["image_features"], out["image_intermediates"][-1]
        local = local if visual.proj is None else local @ visual.proj
    else:
        raise ValueError(
            f"Image tokens are defined for open_clip's ModifiedResNet (RN50, tiny-rn, ...) and VisionTransformer without "
            f"attentional pooling (ViT-B-32, tiny-vit, ...), not for {_tower(visual)}. Use one of those, or a method "
            "that matches global embeddings only."
        )
    pooled = F.normalize(pooled.float(), dim=-1)
    if local is None:
        return pooled, None, None
    return pooled, F.normalize(local.float(), dim=-1), local.new_ones(local.shape[:2], dtype=torch.bool)


def _attention_pool(pool: Any, features: Tensor, tokens: bool) -> tuple[Tensor, Tensor | None]:
    """open_clip's AttentionPool2d on features (N, C, h, w): pooled (N, d) and the h*w projected values (N, h*w, d).

    open_clip computes the queries and outputs of every position and keeps the first; here only the first has a query.
    """
    x = features.flatten(2).transpose(1, 2)  # (N, P, C)
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)  # (N, 1 + P, C)
    x = x + pool.positional_embedding.to(x.dtype)
    value = pool.v_proj(x)
    query, key, heads = (_heads(y, pool.num_heads) for y in (pool.q_proj(x[:, :1]), pool.k_proj(x), value))
    attended = F.scaled_dot_product_attention(query, key, heads)  # (N, heads, 1, C / heads)
    pooled = pool.c_proj(attended.transpose(1, 2).flatten(1))
    return pooled, pool.c_proj(value[:, 1:]) if tokens else None


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)  # (N, L, C) -> (N, heads, L, C / heads)


def encode_text(model: nn.Module, token_ids: Tensor, tokens: bool = False) -> Encoded:
    """Embeddings of captions, token_ids (N, L) int64 from `clip.tokenize`; L may be less than the context length.

    Returns pooled (N, d), equal to `model.encode_text` (normalised) of the ids padded to the context length; text tokens
    (N, L, d) and their mask (N, L), True where a token counts; or None for both unless `tokens`.
    Raises ValueError for more tokens than the model has positions, and for text tokens of a tower without an end token.
    """
    tower: Any = getattr(model, "text", model)
    context_length = int(tower.context_length)
    length = token_ids.shape[1]
    if length > context_length:
        raise ValueError(f"{length} tokens a caption, and the model has {context_length} positions; truncate them.")
    native = tower is model or type(tower) is open_clip.transformer.TextTransformer
    pool = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", "")
    if not native or getattr(tower, "cls_emb", None) is not None or pool not in ("argmax", "eos"):
        if tokens:
            raise ValueError(
                f"Text tokens need a text tower pooled at its end token (argmax or eos), not {_tower(tower)} with pooling "
                f"{pool or 'of its own'!r}. Use such a model, or a method that matches global embeddings only."
            )
        padded = F.pad(token_ids, (0, context_length - length), value=int(getattr(tower, "pad_id", 0)))
        return F.normalize(_unnormalised(model, "encode_text", padded).float(), dim=-1), None, None

    end = token_ids.argmax(dim=-1) if pool == "argmax" else (token_ids == _eos_id(tower)).int().argmax(dim=-1)
    hidden = _hidden(tower, token_ids, context_length)[:, :length]  # (N, L, width)
    rows = torch.arange(len(token_ids), device=token_ids.device)
    pooled = F.normalize(_project(hidden[rows, end], tower.text_projection).float(), dim=-1)
    if not tokens:
        return pooled, None, None
    local = F.normalize(_project(hidden, tower.text_projection).float(), dim=-1)
    # By position and not by id: id 0 is the padding and also the token of "!".
    place = torch.arange(length, device=token_ids.device)
    return pooled, local, (place > 0) & (place <= end[:, None])


def _hidden(tower: Any, token_ids: Tensor, context_length: int) -> Tensor:
    """States after the final norm. Under a causal mask padding cannot reach a caption, so it is never computed."""
    mask = tower.attn_mask
    if mask is None:
        token_ids = F.pad(token_ids, (0, context_length - token_ids.shape[1]), value=int(getattr(tower, "pad_id", 0)))
    length = token_ids.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(token_ids).to(dtype) + tower.positional_embedding[:length].to(dtype)
    x = tower.transformer(x, attn_mask=None if mask is None else mask[:length, :length])
    final: Tensor = tower.ln_final(x)
    return final


def _project(x: Tensor, projection: nn.Linear | Tensor | None) -> Tensor:
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def _eos_id(tower: Any) -> int:
    return int(tower.text_eos_id if hasattr(tower, "text_eos_id") else tower.eos_id)


def _unnormalised(model: Any, method: str, batch: Tensor) -> Tensor:
    # CoCa normalises by default, the others do not; all of them take the keyword.
    embedding: Tensor = getattr(model, method)(batch, normalize=False)
    return embedding


def _tower(module: nn.Module) -> str:
    return type(module).__name__
