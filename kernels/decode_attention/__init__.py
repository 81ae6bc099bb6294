"""``decode_attention``: one query per sequence against a cache of keys and values in 8 or 4 bits."""
