"""The quickstart, and its encoders: both come as packages of the extra `demo`."""

IMAGE_ENCODER = "lite:efficientnet-lite0"
TEXT_ENCODER = "st:all-MiniLM-L6-v2"
