from __future__ import annotations

import pytest
import torch

from medsa_nets.layers import HYPER_PROMPTING_FORMS, Bottlenecks
from medsa_nets.networks import MaskDecoder, TwoWayTransformer

GRID = (6, 9)


@pytest.fixture(scope="module")
def reference(segment_anything, randomise):
    modeling = segment_anything.modeling
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    return randomise(modeling.MaskDecoder(transformer_dim=256, transformer=transformer))


@pytest.fixture(params=HYPER_PROMPTING_FORMS)
def decoder(reference, request):
    """Our decoder on the reference's weights, adapters fresh."""
    ours = MaskDecoder(
        transformer=TwoWayTransformer(adaptation=Bottlenecks(hyper_prompting=request.param, adapter_dim=16))
    ).eval()
    result = ours.load_state_dict(reference.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys
    assert all("adapter" in name for name in result.missing_keys)
    return ours


def make_inputs(batch=1, sets=3, tokens=2):
    """Image embedding, its positional encoding, sparse and dense prompt embeddings."""
    return (
        torch.randn(batch, 256, *GRID),
        torch.randn(1, 256, *GRID),
        torch.randn(batch * sets, tokens, 256),
        torch.randn(batch * sets, 256, *GRID),
    )


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_fresh_decoder_equals_segment_anything(decoder, reference, tokens):
    image, pe, sparse, dense = make_inputs(tokens=tokens)
    with torch.no_grad():
        masks, iou = decoder(image, pe, sparse, dense)
        expected = reference(
            image_embeddings=image,
            image_pe=pe,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
    assert masks.shape == (3, 1, 4 * GRID[0], 4 * GRID[1])
    torch.testing.assert_close(masks, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(iou, expected[1], atol=1e-5, rtol=1e-5)


def test_prompt_sets_of_several_images_follow_one_another(decoder, reference):
    image, pe, sparse, dense = make_inputs(batch=2, sets=3)
    with torch.no_grad():
        masks, _ = decoder(image, pe, sparse, dense)
        for b in range(2):
            own = slice(3 * b, 3 * b + 3)
            expected, _ = reference(
                image_embeddings=image[b : b + 1],
                image_pe=pe,
                sparse_prompt_embeddings=sparse[own],
                dense_prompt_embeddings=dense[own],
                multimask_output=False,
            )
            torch.testing.assert_close(masks[own], expected, atol=1e-5, rtol=1e-5)


def test_class_embedding_is_added_to_the_token_of_the_single_mask(decoder, reference):
    image, pe, sparse, dense = make_inputs(sets=2)
    class_embedding = torch.randn(2, 256)
    with torch.no_grad():
        masks, _ = decoder(image, pe, sparse, dense, class_embedding.unsqueeze(1))
        for k in range(2):
            token = reference.mask_tokens.weight[0].clone()
            reference.mask_tokens.weight[0].add_(class_embedding[k])
            expected, _ = reference(
                image_embeddings=image,
                image_pe=pe,
                sparse_prompt_embeddings=sparse[k : k + 1],
                dense_prompt_embeddings=dense[k : k + 1],
                multimask_output=False,
            )
            reference.mask_tokens.weight[0].copy_(token)
            torch.testing.assert_close(masks[k : k + 1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter", ["hyper_prompt_adapter", "mlp_adapter", "image_adapter"])
@pytest.mark.parametrize("block", [0, 1])
def test_every_adapter_of_every_block_matters(decoder, block, adapter):
    inputs = make_inputs()
    with torch.no_grad():
        before, _ = decoder(*inputs)
        weight = decoder.get_parameter(f"transformer.layers.{block}.{adapter}.up.weight")
        weight.copy_(torch.randn_like(weight))
        after, _ = decoder(*inputs)
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("form", HYPER_PROMPTING_FORMS)
@pytest.mark.parametrize("first", [True, False], ids=["first block", "later block"])
def test_adapters_stand_where_the_paper_puts_them(first, form, randomise):
    """Against the block spelled out with segment-anything's order of operations and the paper's three adapters."""
    transformer = randomise(TwoWayTransformer(adaptation=Bottlenecks(hyper_prompting=form, scale=0.25, adapter_dim=16)))
    block = transformer.layers[0 if first else 1]
    queries, keys = torch.randn(2, 7, 256), torch.randn(2, 20, 256)
    query_pe, key_pe = torch.randn(2, 7, 256), torch.randn(1, 20, 256)
    with torch.no_grad():
        actual = block(queries, keys, query_pe, key_pe)
        if first:
            tokens = block.norm1(block.self_attn(queries, queries, queries))  # SAM: no residual here
        else:
            tokens = block.norm1(queries + block.self_attn(queries + query_pe, queries + query_pe, queries))
        attended = block.cross_attn_token_to_image(tokens + query_pe, keys + key_pe, keys)
        tokens = block.norm2(tokens + block.hyper_prompt_adapter(attended, query_pe))
        tokens = block.norm3(tokens + block.mlp(tokens) + 0.25 * block.mlp_adapter(tokens))
        image = keys + block.cross_attn_image_to_token(keys + key_pe, tokens + query_pe, tokens)
        adapter = block.image_adapter
        image = block.norm4(image + adapter.up(adapter.down(image).relu()))
    torch.testing.assert_close(actual[0], tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual[1], image, atol=1e-5, rtol=1e-5)
