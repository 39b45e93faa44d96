"""The layers that candidates are chosen from, by bucket."""


def buckets(num_layers: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """The three ranges of layers that candidates come from: thirds of 1…N, the last one ending at N − 1.

    Returns:
        Three (first, last) pairs: 30 -> (1, 10), (11, 20), (21, 29); 24 -> (1, 8), (9, 16), (17, 23).

    Raises:
        ValueError: Fewer than 4 layers.
    """
    if num_layers < 4:
        raise ValueError(f"num_layers must be at least 4 for three buckets, got {num_layers}")
    first, second = num_layers // 3, 2 * num_layers // 3
    return (1, first), (first + 1, second), (second + 1, num_layers - 1)


def candidates_in_bucket(num_layers: int, bucket_id: int) -> tuple[int, ...]:
    """The candidates of a bucket: its even layers, or all if those are fewer than 3, or five evenly spaced of more.

    Args:
        num_layers: N.
        bucket_id: 0, 1 or 2.

    Returns:
        Layers, lowest first: 30, 2 -> (22, 24, 26, 28).

    Raises:
        ValueError: There is no such bucket.
    """
    if bucket_id not in (0, 1, 2):
        raise ValueError(f"bucket_id must be 0, 1 or 2, got {bucket_id!r}")
    first, last = buckets(num_layers)[bucket_id]
    layers = range(first, last + 1)  # not a tuple yet: a broken checkpoint may claim any number of layers
    even = layers[first % 2 :: 2]
    if len(even) > 5:
        return tuple(even[i * (len(even) - 1) // 4] for i in range(5))
    return tuple(layers if len(even) < 3 else even)
