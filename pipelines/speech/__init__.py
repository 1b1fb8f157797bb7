"""Steps of audio-visual speech recognition (`pipelines/avsr.py`)."""
