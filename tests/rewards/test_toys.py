"""JPEG size and the one-line colour rewards."""

import io

import pytest
import torch
from PIL import Image

from rlflow.rewards.base import column_names, to_uint8
from rlflow.rewards.colour import brightness, redness
from rlflow.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility, jpeg_kilobytes


def test_jpeg_size_grows_with_noise_and_quality():
    flat = torch.full((1, 3, 32, 32), 0.5)
    noisy = torch.cat([(flat + s * torch.randn(flat.shape)).clamp(0, 1) for s in (0.0, 0.02, 0.06, 0.2, 0.5)])
    sizes = jpeg_kilobytes(noisy)
    assert bool((sizes.diff() > 0).all())
    assert bool((jpeg_kilobytes(noisy, quality=50)[1:] < sizes[1:]).all())
    assert torch.equal(jpeg_incompressibility(noisy), -jpeg_compressibility(noisy))
    assert column_names(jpeg_compressibility) == ("images",)


def test_jpeg_size_is_the_number_of_bytes_of_the_file():
    images = torch.rand(2, 3, 16, 16)
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(images)[1]).save(buffer, format="JPEG", quality=95)
    assert jpeg_kilobytes(images)[1] == pytest.approx(len(buffer.getvalue()) / 1000)


def test_colours_by_hand():
    red, black, white = torch.zeros(3, 3, 4, 4)
    red[0], white[:] = 1, 1
    half = torch.zeros(3, 4, 4)
    half[:, :, :2] = 1
    images = torch.stack([red, black, white, half])
    torch.testing.assert_close(brightness(images), torch.tensor([1 / 3, 0, 1, 0.5]))
    torch.testing.assert_close(redness(images), torch.tensor([1.0, 0, 0, 0]))
