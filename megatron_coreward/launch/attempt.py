"""The former name of `megatron_coreward.attempt`, which jobs that were submitted before still call."""

if __name__ == "__main__":
    raise SystemExit(
        "error: python -m megatron_coreward.launch.attempt is called python -m megatron_coreward.attempt now; submit "
        "the job again"
    )
