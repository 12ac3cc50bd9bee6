"""Starts for small networks: an autoencoder as a linear code of patches, TC-MoA as the average."""

from __future__ import annotations

import torch
from torch import nn

from fusionkit.models.mae import MaskedAutoencoder
from fusionkit.models.patches import PATCH
from fusionkit.models.tcmoa import TCMoA

CARRIER, CONTENT = 12.0, 3.0  # lengths of a token's constant part, and of its picture part (rms)
OWN_SHARE, OWN_SHARE_DECODER = 0.1, 0.99  # λ at first: the encoder fuses, the decoder hardly
RIDGE = 1e-6  # with less, the last layer magnifies whatever changes in directions hardly used


@torch.no_grad()
def linear_start(
    autoencoder: MaskedAutoencoder,
    pictures: torch.Tensor,
    components: int = 34,
    carrier_length: float = CARRIER,
) -> MaskedAutoencoder:
    """Let an autoencoder begin as a linear code of patches, in place.

    Drawn at random, a narrow autoencoder learns in some thousand steps to paint blurred patches
    with visible borders. But the principal components of patches fit into its tokens: the patch
    embedding computes them, the blocks at first add nothing (their last layers are zero), and the
    last layer, a regression, gives the patches back. Training goes on from there.

    In each token the components stand at right angles to the position embedding's large directions,
    so that they do not mix. A layer norm divides by a token's spread, which would differ with the
    position and the brightness; a long constant part, also at right angles, keeps it nearly alike.

    Args:
        pictures: (B, 1 or 3, 112, 112) in [0, 1], from which components and regression are taken.
        components: of a patch, strongest first; both widths must have that many directions, and a
            few more, that positions leave free: 34 of 48.
        carrier_length: of the constant part. Positions are longer in wider tokens, and want a
            longer one: with 60 components of 256 channels 12 gives back 41 dB, and 48 54 dB.

    Raises:
        ValueError: too many components for the widths.
    """
    narrowest = min(autoencoder.decoder_embed.weight.shape)
    if not 1 <= components <= narrowest - 2:
        raise ValueError(f"components is {components}; expected 1 to {narrowest - 2}")
    for stack in (autoencoder.encoder, autoencoder.decoder):
        for block in stack.blocks:
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.fc2.weight)
    patches = autoencoder.patches(pictures).flatten(0, 1)
    mean = patches.mean(0)
    energy, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    energy, directions = energy.flip(0)[:components], directions.flip(1)[:, :components]
    # Halfway to equal strengths: fine detail must not drown, nor brightness be magnified later.
    strengths = energy.clamp(min=1e-8) ** -0.25
    strengths *= CONTENT / (energy * strengths.square()).sum().sqrt()

    place, carrier = _free_directions(autoencoder.encoder_position, components)
    embed = place @ (strengths[:, None] * directions.T)
    weight = embed.unflatten(1, (PATCH, PATCH, 3)).permute(0, 3, 1, 2)
    autoencoder.patch_embed.weight.copy_(weight)
    autoencoder.patch_embed.bias.copy_(carrier_length * carrier - embed @ mean)

    spread = carrier_length / len(carrier) ** 0.5  # what the encoder's norm divides by
    decoder_place, carrier = _free_directions(autoencoder.decoder_position, components)
    autoencoder.decoder_embed.weight.copy_(spread * decoder_place @ place.T)
    autoencoder.decoder_embed.bias.copy_(carrier_length * carrier)

    return fit_last_layer(autoencoder, pictures)


@torch.no_grad()
def average_start(network: TCMoA, components: int) -> TCMoA:
    """Let a network on a backbone of `linear_start` begin as the average of its sources, in place.

    The fusion layers of a TC-MoA layer pass a quarter of the channels. Drawn at random, they lose
    most of a picture, and bring it back only as far as training goes. Here they start as the
    projection onto the backbone's components and constant part, strongest first. Adapters start at
    zero, so all prompts are a half: the encoder's layers give the average, and the decoder's leave
    it alone. Source embeddings start at zero, or they would paint a pattern into every patch; and
    reductions look at components only, since the constant part would outweigh them.

    Args:
        components: as given to `linear_start`.
    """
    for tower, position, share in (
        (network.encoder, network.encoder_position, OWN_SHARE),
        (network.decoder, network.decoder_position, OWN_SHARE_DECODER),
    ):
        place, carrier = _free_directions(position, components)
        for layer in tower.layers:
            first, middle, last = layer.fusion
            dim = len(middle.weight)
            basis = torch.cat([carrier[:, None], place], dim=1)[:, :dim]  # (C, dim or fewer)
            first.weight[: basis.shape[1], :, 0, 0] = basis.T
            nn.init.zeros_(last.weight)
            last.weight[:, : basis.shape[1], 0, 0] = basis
            nn.init.dirac_(middle.weight)
            layer.mixing.fill_(share)
            nn.init.zeros_(layer.source_embedding)
            for adapter in layer.adapters:
                for parameter in adapter[-1].parameters():
                    nn.init.zeros_(parameter)
            reduction = layer.reduce[1]
            both = reduction.weight.unflatten(1, (2, -1))
            reduction.weight.copy_((both @ place @ place.T).flatten(1))
    return network


def _free_directions(position: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` directions (C, count), and one more (C,), where positions and the mean are least."""
    taken = torch.cat([position[0].flatten(1), position.new_ones(position.shape[1], 1)], dim=1)
    directions = torch.linalg.svd(taken)[0]
    return directions[:, -count:], directions[:, -count - 1]


@torch.no_grad()
def fit_last_layer(
    autoencoder: MaskedAutoencoder, pictures: torch.Tensor, mode: str = "bilinear"
) -> MaskedAutoencoder:
    """Regress patches on what reaches the last layer with no patch hidden, in place.

    The last step of `linear_start`. After masked training it takes back what guessing hidden
    patches cost the visible ones.

    Args:
        pictures: as for `linear_start`.
        mode: how the pictures to be predicted are enlarged. "bilinear" is what the network sees;
            averaged 2×2 it is a blurred picture, and "nearest" the picture itself.
    """
    patches = autoencoder.patches(pictures, mode).flatten(0, 1)
    inputs: list[torch.Tensor] = []
    last = autoencoder.decoder_pred
    hook = last.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        autoencoder(pictures, mask_ratio=0.0)
    finally:
        hook.remove()
    tokens = nn.functional.pad(inputs[0].flatten(0, 1), (0, 1), value=1.0).double()
    gram = tokens.T @ tokens
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, tokens.T @ patches.double())
    last.weight.copy_(solution[:-1].T)
    last.bias.copy_(solution[-1])
    return autoencoder
