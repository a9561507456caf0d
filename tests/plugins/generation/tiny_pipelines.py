# pyright: reportArgumentType=false, reportCallIssue=false
"""Diffusers pipelines with tiny networks and random weights."""

from __future__ import annotations

import diffusers
import transformers

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GENTLE = {"beta_start": 1e-4, "beta_end": 0.002, "beta_schedule": "linear"}
BLOCKS = {"layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}


def tokenizer():
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=8)


def text_encoder(class_name):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = transformers.CLIPTextConfig(vocab_size=54, max_position_embeddings=8, projection_dim=16, **sizes, **marks)
    return getattr(transformers, class_name)(config)


def decoder(latents=4, **options):
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return diffusers.AutoencoderKL(
        latent_channels=latents, down_block_types=down, up_block_types=up, **BLOCKS, **options
    )


def plain_unet(**options):
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(sample_size=8, attention_head_dim=8, **BLOCKS, **blocks, **options)


def text_unet(**options):
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    options = {"cross_attention_dim": 16, "attention_head_dim": 4, **options}
    return diffusers.UNet2DConditionModel(sample_size=8, down_block_types=down, up_block_types=up, **BLOCKS, **options)


def ddpm():
    return diffusers.DDPMPipeline(plain_unet(), diffusers.DDPMScheduler(**GENTLE, clip_sample=False))


def ddim_of_classes():
    return diffusers.DDIMPipeline(plain_unet(num_class_embeds=3), diffusers.DDIMScheduler(**GENTLE, clip_sample=False))


def stable_diffusion():
    scheduler = diffusers.DDIMScheduler(
        **LATENT, prediction_type="v_prediction", steps_offset=1, set_alpha_to_one=False, clip_sample=False
    )
    parts = (decoder(), text_encoder("CLIPTextModel"), tokenizer(), text_unet(), scheduler, None, None)
    return diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)


def stable_diffusion_xl():
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = text_unet(
        cross_attention_dim=32, projection_class_embeddings_input_dim=40, use_linear_projection=True, **added
    )
    texts = (text_encoder("CLIPTextModel"), text_encoder("CLIPTextModelWithProjection"), tokenizer(), tokenizer())
    scheduler = diffusers.EulerDiscreteScheduler(**LATENT, steps_offset=1, timestep_spacing="leading")
    return diffusers.StableDiffusionXLPipeline(decoder(), *texts, unet, scheduler)


def dit():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, out_channels=8, num_layers=1, sample_size=8, num_embeds_ada_norm=5
    )
    return diffusers.DiTPipeline(transformer, decoder(), diffusers.DDIMScheduler(**GENTLE, clip_sample=False))


def stable_diffusion_3():
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16, "num_layers": 1}
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=8, out_channels=8, joint_attention_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8, **sizes,
    )  # fmt: skip
    vae = decoder(8, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False)
    texts = (text_encoder("CLIPTextModelWithProjection"), tokenizer()) * 2
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return diffusers.StableDiffusion3Pipeline(transformer, scheduler, vae, *texts, None, None)


BUILDERS = (ddpm, ddim_of_classes, stable_diffusion, stable_diffusion_xl, dit, stable_diffusion_3)
