"""Families of models that see images: small settings of their configurations and processors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.models import MODELS, MOE, WINDOW

PATCH, MERGE = 4, 2  # pixels; patches in each direction that are one token
SIDE = 16  # pixels, of images that are made square, and of tiles

_TOKENS = (
    "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|> <|begin_of_image|> "
    "<|end_of_image|> <|image|> <|begin_of_video|> <|end_of_video|> <|video|> <img> </img> "
    "<IMG_CONTEXT> <video> <|reserved|> <image> [IMG] [IMG_BREAK] [IMG_END] <|image_start|> "
    "<|image_end|> <|img_thumbnail|> <|media_begin|> <|media_content|> <|media_pad|> <|media_end|> "
    "<|kimi_k25_video_placeholder|> ]<]image[>[ ]<]video[>[ <|patch|> <|vid_start|> <|vid_end|> "
    "<|vid_frame_separator|> <fake_token_around_image> <global-img> <end_of_utterance> "
    "<|START_OF_IMG|> <|END_OF_IMG|> <|IMG_PATCH|> <|IMG_LINE_BREAK|> TILE_GLOBAL <IMG_START> "
    "<IMG_ATOM> <IMG_GRID> <IMG_COL> <IMG_ROW> <IMG_END> <im_patch> <im_start> <im_end> "
    "<patch_start> <patch_end> <patch_newline> <start_of_image> <end_of_image> <image_soft_token> "
    "<|image> <image|> <|audio> <|audio|> <audio|>"
)
TOKENS = [
    *_TOKENS.split(),
    "]<]start of image[>[",
    "]<]end of image[>[",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
    *(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)),
]
"""What the families' processors write in the place of an image, or of a video."""


@dataclass(frozen=True)
class Family:
    """A family, in small.

    Attributes:
        processor: The class of its processors.
        images: The class of its image processors.
        resized: Settings of the image processor.
        config: Settings of the model's configuration, beyond what all have.
        place: What its chat templates write for an image.
        settings: Settings of the processor.
        names: Attributes of its tokenizer that are tokens.
        tokens: Attributes of the model's configuration that are tokens, or lists of them.
        videos: The class of its video processors, where it can't be without; needs torchvision.
    """

    processor: str
    images: str
    resized: dict[str, Any]
    config: dict[str, Any]
    place: str = "<image>"
    settings: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, Any] = field(default_factory=dict)
    videos: str | None = None

    @property
    def needs_torchvision(self) -> bool:
        """Whether its processor can't be made without torchvision."""
        return not self.images.endswith("Pil") or "Pixtral" in self.processor or bool(self.videos)


_BY_AREA = dict(
    size={"shortest_edge": 64, "longest_edge": 4096}, patch_size=PATCH, merge_size=MERGE
)
_SQUARE = dict(size={"height": SIDE, "width": SIDE})
_TILES = dict(**_SQUARE, max_patches=3)

QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
GLM = "<|begin_of_image|><|image|><|end_of_image|>"

_LLAMA, _QWEN2 = dict(model_type="llama"), dict(model_type="qwen2")
_QWEN3 = dict(model_type="qwen3", head_dim=16)
_COHERE = dict(
    model_type="cohere2",
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention"],
    logit_scale=1.0,
)


def _planes(*frequencies: int, **more: Any) -> dict[str, Any]:
    """Return rotary embeddings with this many frequencies for each plane of positions."""
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=list(frequencies), **more)
    return dict(rope_parameters=rope)


# Of the three planes together half a head.
_MROPE = dict(head_dim=16, **_planes(2, 3, 3))
_GLM_MROPE = dict(head_dim=16, **_planes(1, 1, 2, partial_rotary_factor=0.5))
_LINEAR = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)

_GEMMA = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])

# Vision towers, each of two layers.
_SIZES = dict(hidden_size=32, intermediate_size=48, patch_size=PATCH)
_TOWER = dict(**_SIZES, num_hidden_layers=2, num_attention_heads=4)
_SQUARE_TOWER = dict(**_TOWER, image_size=SIDE)
_CLIP = dict(**_SQUARE_TOWER, model_type="clip_vision_model", projection_dim=32)
_SIGLIP = dict(**_SQUARE_TOWER, model_type="siglip_vision_model", vision_use_head=False)
_PIXTRAL = dict(
    **_TOWER,
    model_type="pixtral",
    head_dim=8,
    image_size=64,
    rope_parameters=dict(rope_type="default", rope_theta=1e4),
)
_QWEN_TOWER = dict(**_SIZES, depth=2, num_heads=4)
_QWEN25_TOWER = dict(
    **_QWEN_TOWER, out_hidden_size=32, fullatt_block_indexes=[1], window_size=4 * PATCH
)
_QWEN3_TOWER = dict(
    **_QWEN_TOWER, spatial_merge_size=MERGE, out_hidden_size=32, num_position_embeddings=64
)
_GLM_TOWER = dict(
    **_QWEN_TOWER, spatial_merge_size=MERGE, out_hidden_size=32, image_size=32, rms_norm_eps=1e-5
)
_INTERN_TOWER = dict(**_TOWER, image_size=[SIDE, SIDE])
_INTERN_TOWER["patch_size"] = [PATCH, PATCH]


def _qwen(text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Family:
    """Return a family with Qwen's image processors and template."""
    settings = dict(
        processor="Qwen3VLProcessor", images="Qwen2VLImageProcessorPil", resized=_BY_AREA
    )
    config = dict(text_config=text, vision_config=vision, **more.pop("config", {}))
    return Family(**{**settings, "place": QWEN, "config": config, **more})


def _glm(text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Family:
    settings = dict(processor="Glm46VProcessor", images="Glm46VImageProcessorPil")
    config = dict(text_config=text, vision_config=vision)
    return Family(**{**settings, "resized": _BY_AREA, "place": GLM, "config": config, **more})


def _llava(**config: Any) -> Family:
    return Family(
        "LlavaProcessor",
        "CLIPImageProcessorPil",
        dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        dict(text_config=_LLAMA, vision_config=_CLIP, **config),
        "<image>\n",
        _LLAVA_TOKENS,
    )


def _pixtral(processor: str, place: str, text: dict[str, Any], **more: Any) -> Family:
    return Family(
        processor,
        "PixtralImageProcessorPil",
        dict(size={"longest_edge": 48}, patch_size=PATCH * MERGE),
        dict(text_config=text, vision_config=_PIXTRAL, spatial_merge_size=MERGE),
        place,
        dict(patch_size=PATCH, spatial_merge_size=MERGE),
        **more,
    )


def _idefics(prefix: str, **more: Any) -> Family:
    return Family(
        f"{prefix}Processor",
        f"{prefix}ImageProcessorPil",
        dict(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}),
        dict(text_config=_LLAMA, vision_config=_SQUARE_TOWER, scale_factor=2),
        settings=dict(image_seq_len=4),
        **more,
    )


_LLAVA_TOKENS = dict(
    patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
)
_PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
_INTERN_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

FAMILIES: dict[str, Family] = {
    "aria": Family(
        "AriaProcessor",
        "AriaImageProcessorPil",
        {},
        dict(
            text_config=dict(moe_num_experts=4),
            vision_config={**_TOWER, "model_type": "idefics3_vision", "image_size": 980}
            | dict(patch_size=140),
            projector_patch_to_query_dict={49: 4},
        ),
        settings=dict(size_conversion={980: 4}),
        names=dict(image_token="<image>"),
    ),
    "aya_vision": Family(
        "AyaVisionProcessor",
        "GotOcr2ImageProcessorPil",
        _TILES,
        dict(text_config=_COHERE, vision_config=_SIGLIP, downsample_factor=2),
        settings=dict(patch_size=PATCH, img_size=SIDE, downsample_factor=2),
        tokens=dict(image_token_id="<|IMG_PATCH|>"),
    ),
    "cohere2_vision": Family(
        "Cohere2VisionProcessor",
        "Cohere2VisionImageProcessor",
        dict(**_TILES, patch_size=2),
        dict(
            text_config=_COHERE,
            vision_config=_SIGLIP,
            downsample_factor=2,
            alignment_intermediate_size=32,
        ),
        names=dict(
            image_token="<image>",
            boi_token="<|START_OF_IMG|>",
            eoi_token="<|END_OF_IMG|>",
            img_line_break_token="<|IMG_LINE_BREAK|>",
        ),
    ),
    "cosmos3_edge": _qwen(
        _MROPE,
        dict(**_TOWER, num_patches=16),
        processor="Cosmos3EdgeProcessor",
        images="Cosmos3EdgeImageProcessorPil",
        config=dict(projector_hidden_size=32),
    ),
    "cosmos3_omni": _qwen(_MROPE, dict(**_QWEN3_TOWER, deepstack_visual_indexes=[0])),
    "deepseek_vl": Family(
        "DeepseekVLProcessor",
        "DeepseekVLImageProcessorPil",
        _SQUARE,
        dict(text_config=_LLAMA, vision_config=_SIGLIP),
        settings=dict(num_image_tokens=16),
        names=dict(image_token="<image>"),
    ),
    "exaone4_5": _qwen(
        dict(model_type="exaone4"),
        dict(**_QWEN25_TOWER, num_key_value_heads=2),
        processor="Exaone4_5_Processor",
    ),
    "gemma3": Family(
        "Gemma3Processor",
        "Gemma3ImageProcessorPil",
        _SQUARE,
        dict(
            text_config=dict(**_GEMMA, head_dim=16, query_pre_attn_scalar=16),
            vision_config=_SQUARE_TOWER,
            mm_tokens_per_image=4,
        ),
        "<start_of_image>",
        dict(image_seq_length=4),
        dict(
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
            image_token="<image_soft_token>",
        ),
        dict(image_token_id="<image_soft_token>"),
    ),
    "gemma4": Family(
        "Gemma4Processor",
        "Gemma4ImageProcessorPil",
        dict(patch_size=PATCH, pooling_kernel_size=MERGE, max_soft_tokens=70),
        dict(
            text_config=dict(
                **_GEMMA,
                head_dim=8,
                global_head_dim=8,
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=1024,
                use_bidirectional_attention="vision",
            ),
            vision_config=dict(
                **_TOWER,
                num_key_value_heads=4,
                head_dim=8,
                pooling_kernel_size=MERGE,
                position_embedding_size=128,
            ),
        ),
        "<|image|>",
        {},
        dict(
            boi_token="<|image>",
            eoi_token="<image|>",
            image_token="<|image|>",
            boa_token="<|audio>",
            eoa_token="<audio|>",
            audio_token="<|audio|>",
        ),
    ),
    "glm46v": _glm(
        dict(model_type="glm4v_text", **_GLM_MROPE), dict(model_type="glm4v_vision", **_GLM_TOWER)
    ),
    "glm4v": _glm(_GLM_MROPE, _GLM_TOWER),
    "glm4v_moe": _glm(
        dict(
            **_GLM_MROPE,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
        ),
        _GLM_TOWER,
    ),
    "glm_ocr": _glm(dict(head_dim=8, **_planes(1, 1, 2)), _GLM_TOWER),
    "glmga": _glm(_GLM_MROPE, _GLM_TOWER, images="GlmgaImageProcessorPil"),
    "hyperclovax_vision_v2": _qwen(
        dict(model_type="hyperclovax"), _QWEN25_TOWER, processor="HyperCLOVAXVisionV2Processor"
    ),
    "idefics3": _idefics("Idefics3"),
    "internvl": Family(
        "InternVLProcessor",
        "GotOcr2ImageProcessorPil",
        _TILES,
        dict(
            text_config=_QWEN3,
            vision_config=_INTERN_TOWER,
            image_seq_length=4,
            downsample_ratio=0.5,
        ),
        "<IMG_CONTEXT>\n",
        dict(image_seq_length=4),
        _INTERN_NAMES,
    ),
    "janus": Family(
        "JanusProcessor",
        "JanusImageProcessorPil",
        _SQUARE,
        dict(
            text_config=_LLAMA,
            vision_config=dict(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=SIDE,
                patch_size=PATCH,
                projection_dim=32,
                mlp_ratio=2.0,
                num_image_tokens=16,
            ),
            vq_config=dict(embed_dim=8, num_embeddings=16, base_channels=32, latent_channels=8),
        ),
        settings=dict(num_image_tokens=16),
        names=dict(image_token="<image>", boi_token="<im_start>", eoi_token="<im_end>"),
    ),
    "kimi_k25": Family(
        "Kimi_K25Processor",
        "Kimi_K25ImageProcessor",
        dict(patch_size=PATCH, merge_size=MERGE, max_patches=64),
        dict(
            text_config=MODELS["deepseek_v3"],
            vision_config={**_TOWER, "num_attention_heads": 2}
            | dict(pos_emb_height=8, pos_emb_width=8),
            projection_hidden_size=32,
        ),
        "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n",
        videos="Kimi_K25VideoProcessor",
    ),
    "lfm2_vl": Family(
        "Lfm2VlProcessor",
        "Lfm2VlImageProcessor",
        dict(
            **_SQUARE,
            tile_size=SIDE,
            encoder_patch_size=PATCH,
            min_image_tokens=4,
            max_image_tokens=8,
            max_tiles=4,
            max_pixels_tolerance=1.0,
        ),
        dict(
            text_config=dict(model_type="lfm2", layer_types=["conv", "full_attention"]),
            vision_config=dict(
                **_TOWER, model_type="siglip2_vision_model", num_patches=16, vision_use_head=False
            ),
            projector_hidden_size=32,
        ),
    ),
    "lfm3_vl": _qwen(
        dict(model_type="lfm3"),
        dict(**_TOWER, num_key_value_heads=2),
        processor="Lfm3VlProcessor",
        config=dict(projector_hidden_size=32),
    ),
    "lighton_ocr": _pixtral(
        "LightOnOcrProcessor",
        "<image>",
        _QWEN3,
        names=dict(
            image_token="<image>", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]"
        ),
    ),
    "llava": _llava(),
    "llava_next": Family(
        "LlavaNextProcessor",
        "LlavaNextImageProcessorPil",
        dict(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=_PINPOINTS,
        ),
        dict(text_config=_LLAMA, vision_config=_CLIP, image_grid_pinpoints=_PINPOINTS),
        "<image>\n",
        _LLAVA_TOKENS,
    ),
    "minimax_m3_vl": Family(
        "MiniMaxM3VLProcessor",
        "MiniMaxM3VLImageProcessor",
        _BY_AREA,
        dict(
            text_config=dict(
                head_dim=16,
                rotary_dim=8,
                dense_intermediate_size=48,
                shared_intermediate_size=24,
                num_local_experts=4,
                num_experts_per_tok=2,
                mlp_layer_types=["dense", "sparse"],
            ),
            vision_config={**_TOWER, "hidden_size": 48, "image_size": 64},
            projector_hidden_size=32,
        ),
        "]<]image[>[",
        videos="MiniMaxM3VLVideoProcessor",
    ),
    "mistral3": _pixtral(
        "PixtralProcessor", "[IMG]", dict(model_type="mistral", sliding_window=None)
    ),
    "muse_glimmer": Family(
        "MuseGlimmerProcessor",
        "MuseGlimmerImageProcessor",
        dict(patch_size=PATCH, merge_size=MERGE, max_image_tokens=24),
        dict(
            text_config=dict(head_dim=16, sliding_window=WINDOW),
            vision_config={**_TOWER, "num_attention_heads": 2}
            | dict(pos_emb_height=8, pos_emb_width=8, max_position_embeddings=64),
            out_hidden_size=128,
            projector_hidden_size=32,
        ),
        "<|patch|>",
        videos="MuseGlimmerVideoProcessor",
    ),
    "ovis2": Family(
        "Ovis2Processor",
        "Ovis2ImageProcessorPil",
        dict(**_TILES, crop_to_patches=True),
        dict(
            text_config=_QWEN2,
            vision_config=dict(**_SQUARE_TOWER, vocab_size=32, hidden_stride=2),
            hidden_size=32,
        ),
        settings=dict(image_seq_length=4),
        tokens=dict(
            image_token_id="<IMG_ATOM>",
            visual_indicator_token_ids=[
                "<IMG_START>",
                "<IMG_GRID>",
                "<IMG_COL>",
                "<IMG_ROW>",
                "<IMG_END>",
            ],
        ),
    ),
    "paddleocr_vl": _qwen(
        _MROPE,
        dict(**_TOWER, image_size=32),
        processor="PaddleOCRVLProcessor",
        images="PaddleOCRVLImageProcessorPil",
        names=dict(image_token="<|image_pad|>"),
    ),
    "qwen2_5_vl": _qwen(_planes(1, 1, 2), _QWEN25_TOWER, processor="Qwen2_5_VLProcessor"),
    "qwen2_vl": _qwen(
        _planes(1, 1, 2),
        dict(depth=2, embed_dim=32, hidden_size=32, num_heads=4, patch_size=PATCH, mlp_ratio=2),
        processor="Qwen2VLProcessor",
    ),
    "qwen3_5": _qwen(dict(**_MROPE, **_LINEAR), _QWEN3_TOWER),
    "qwen3_5_moe": _qwen(
        dict(**_MROPE, **_LINEAR, **MOE, shared_expert_intermediate_size=24), _QWEN3_TOWER
    ),
    "qwen3_vl": _qwen(_MROPE, dict(**_QWEN3_TOWER, deepstack_visual_indexes=[0, 1])),
    "qwen3_vl_moe": _qwen(
        dict(**_MROPE, **MOE, decoder_sparse_step=1),
        dict(**_QWEN3_TOWER, deepstack_visual_indexes=[0]),
    ),
    "smolvlm": _idefics("SmolVLM", videos="SmolVLMVideoProcessor"),
    "step3p7": Family(
        "Step3p7Processor",
        "Step3p7ImageProcessor",
        dict(
            size={"height": 2 * SIDE, "width": 2 * SIDE},
            patch_size=SIDE,
            vision_patch_size=PATCH,
            downsampler_stride=4,
        ),
        dict(
            text_config=dict(
                head_dim=16,
                n_routed_experts=4,
                num_local_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=24,
                share_expert_dim=24,
                mlp_layer_types=["dense", "sparse"],
                layer_types=["sliding_attention", "full_attention"],
                sliding_window=WINDOW,
            ),
            vision_config=dict(
                **_TOWER, image_size=2 * SIDE, mlp_ratio=2.0, max_position_embeddings=64
            ),
        ),
        "<im_patch>",
    ),
    "video_llama_3": Family(
        "VideoLlama3Processor",
        "VideoLlama3ImageProcessorPil",
        {**_BY_AREA, "merge_size": 1},
        dict(text_config=_QWEN2, vision_config=_TOWER),
        "<|image_pad|>",
    ),
    "vipllava": _llava(vision_feature_layers=[-1, -2]),
}
"""By the model type."""
