"""Audio-visual speech recognition on cached features: AVSR (ACL 2022). See README.md."""
