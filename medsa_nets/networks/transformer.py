"""SAM's two-way transformer with the three adapters of each decoder block."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from medsa_nets.layers import Adaptation, Bottlenecks, Linear, MLPBlock, attend


class Attention(nn.Module):
    """Multi-head attention whose inner width is ``features // downsample_rate``."""

    def __init__(self, features: int, *, num_heads: int, downsample_rate: int = 1) -> None:
        super().__init__()
        inner = features // downsample_rate
        self.num_heads = num_heads
        self.q_proj = Linear(features, inner)
        self.k_proj = Linear(features, inner)
        self.v_proj = Linear(features, inner)
        self.out_proj = Linear(inner, features)

    def split_heads(self, x: Tensor) -> Tensor:
        """Split (B, N, C) into (B, heads, N, C / heads)."""
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, -1).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from ``q`` (B, N, C) to ``k`` and ``v`` (B, M, C)."""
        q, k, v = self.split_heads(self.q_proj(q)), self.split_heads(self.k_proj(k)), self.split_heads(self.v_proj(v))
        return self.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class TwoWayAttentionBlock(nn.Module):
    """Decoder block: tokens attend to themselves and to the image, the image attends back; three adapters.

    (1) a hyper-prompting adapter after the prompt-to-image cross-attention, (2) an adapter beside the MLP, scaled,
    (3) an adapter after the residual of the image-to-prompt cross-attention, with a residual of its own before the
    layer norm (arXiv 2304.12620, section "Hyper-Prompting Adapter").

    Attributes:
        embed_values: whether the self-attention's values and residual hold the prompt embeddings too, and the first
            block has a residual (EfficientSAM, :class:`~medsa_nets.layers.PublishedDecoder`).
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        mlp_dim: int,
        skip_first_layer_pe: bool,
        adaptation: Adaptation,
        activation: Callable[[], nn.Module] = nn.ReLU,
        embed_values: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.self_attn = Attention(features, num_heads=num_heads)
        self.norm1 = nn.LayerNorm(features, eps=norm_eps)
        self.cross_attn_token_to_image = Attention(features, num_heads=num_heads, downsample_rate=2)
        self.norm2 = nn.LayerNorm(features, eps=norm_eps)
        self.mlp = MLPBlock(features=features, hidden=mlp_dim, activation=activation())
        self.norm3 = nn.LayerNorm(features, eps=norm_eps)
        self.norm4 = nn.LayerNorm(features, eps=norm_eps)
        self.cross_attn_image_to_token = Attention(features, num_heads=num_heads, downsample_rate=2)
        self.skip_first_layer_pe = skip_first_layer_pe
        self.embed_values = embed_values
        self.scale = adaptation.scale
        self.hyper_prompt_adapter = adaptation.prompted_adapter(features, features)
        self.mlp_adapter = adaptation.adapter(features)
        self.image_adapter = adaptation.adapter(features, skip=True)

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
        """Update tokens and image.

        Args:
            queries: tokens (B, N, C).
            keys: image embedding (B, M, C).
            query_pe: the tokens before the first block (B, N, C): output tokens and prompt embeddings.
            key_pe: positional encoding of the image (B or 1, M, C).

        Returns:
            Tokens and image embedding, of the same shapes.
        """
        if self.embed_values:
            if not self.skip_first_layer_pe:
                queries = queries + query_pe
            queries = queries + self.self_attn(queries, queries, queries)
        elif self.skip_first_layer_pe:
            queries = self.self_attn(queries, queries, queries)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries)
        queries = self.norm1(queries)

        attended = self.cross_attn_token_to_image(queries + query_pe, keys + key_pe, keys)
        queries = self.norm2(queries + self.hyper_prompt_adapter(attended, query_pe))

        queries = self.norm3(queries + self.mlp(queries) + self.scale * self.mlp_adapter(queries))

        keys = keys + self.cross_attn_image_to_token(keys + key_pe, queries + query_pe, queries)
        return queries, self.norm4(self.image_adapter(keys))


class TwoWayTransformer(nn.Module):
    """SAM's decoder transformer.

    Args:
        depth: number of blocks.
        features: token width.
        num_heads: heads per attention.
        mlp_dim: hidden width of the MLP.
        adaptation: makes the adapters.
        activation: makes the activation of the MLPs.
        embed_values: see :class:`TwoWayAttentionBlock`.
        norm_eps: what the layer norms add to the variance.
    """

    def __init__(
        self,
        *,
        depth: int = 2,
        features: int = 256,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        adaptation: Adaptation = Bottlenecks(),  # noqa: B008 - it is frozen
        activation: Callable[[], nn.Module] = nn.ReLU,
        embed_values: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                TwoWayAttentionBlock(
                    features,
                    num_heads=num_heads,
                    mlp_dim=mlp_dim,
                    skip_first_layer_pe=i == 0,
                    adaptation=adaptation,
                    activation=activation,
                    embed_values=embed_values,
                    norm_eps=norm_eps,
                )
                for i in range(depth)
            ]
        )
        self.final_attn_token_to_image = Attention(features, num_heads=num_heads, downsample_rate=2)
        self.norm_final_attn = nn.LayerNorm(features, eps=norm_eps)

    def forward(self, keys: Tensor, key_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            keys: image embedding as tokens (B, h * w, C).
            key_pe: positional encoding of the image (1, h * w, C).
            tokens: output tokens and prompt embeddings (B, N, C).

        Returns:
            Tokens (B, N, C) and image embedding (B, h * w, C).
        """
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, key_pe)
        attended = self.final_attn_token_to_image(queries + tokens, keys + key_pe, keys)
        return self.norm_final_attn(queries + attended), keys
