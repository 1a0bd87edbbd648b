"""Schemes are named as compressed-tensors names its presets."""

import pytest

from quantgate.subject.scheme import quantizes_activations, scheme_name


@pytest.mark.parametrize(
    "preset",
    [
        "W4A16",
        "W4A16_ASYM",
        "W8A16",
        "FP8",
        "FP8_DYNAMIC",
        "FP8_BLOCK",
        "NVFP4",
        "NVFP4A16",
        "MXFP4A16",
    ],
)
def test_scheme_is_named_as_compressed_tensors_presets_are(preset: str) -> None:
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme

    group = preset_name_to_scheme(preset, ["Linear"])
    config = QuantizationConfig(config_groups={"group_0": group}).model_dump(mode="json")
    assert scheme_name(config) == preset
    assert quantizes_activations(config) == ("A16" not in preset)
