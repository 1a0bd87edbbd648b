from quantgate.subject.scheme import scheme_name


def test_int8_activations_are_named_by_when_their_scale_is_taken() -> None:
    weights = {"num_bits": 8, "type": "int", "symmetric": True}
    dynamic = {
        "weights": weights,
        "input_activations": {"num_bits": 8, "type": "int", "dynamic": True},
    }
    static = {"weights": weights, "input_activations": {"num_bits": 8, "type": "int"}}
    assert scheme_name({"config_groups": {"g": dynamic}}) == "W8A8"
    assert scheme_name({"config_groups": {"g": static}}) == "W8A8_STATIC"


def test_groups_and_kv_cache_are_joined() -> None:
    w4 = {"weights": {"num_bits": 4, "type": "int", "symmetric": True}}
    w8 = {"weights": {"num_bits": 8, "type": "int", "symmetric": True}}
    config = {"config_groups": {"b": w8, "a": w4}, "kv_cache_scheme": {"num_bits": 8}}
    assert scheme_name(config) == "W4A16+W8A16+KV_FP8"
    assert scheme_name(None) == scheme_name({}) == "none"
