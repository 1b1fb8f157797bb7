"""Contract tests for plug-in authors: subclass the class of your kind of plug-in in a file that pytest collects.

- a source: `embedcache.testing.sources.SourceContract`;
- an encoder: `ImageEncoderContract`, `TextEncoderContract`, `AudioEncoderContract`, `VideoEncoderContract` or
  `PointsEncoderContract` of `embedcache.testing.encoders`;
- a projector: `embedcache.testing.projectors.ProjectorContract` or `TokenProjectorContract`;
- a loss: `embedcache.testing.losses.LossContract`;
- a method of selection: `embedcache.testing.selectors.SelectorContract`;
- a classifier of `evaluate probe`: `embedcache.testing.classifiers.ClassifierContract`.

pytest must be installed. Nothing else in the package imports these modules.
"""

import pytest

# Without it, a failed assert in these modules would not show the values that it compared.
for _name in ("classifiers", "encoders", "losses", "projectors", "selectors", "sources"):
    pytest.register_assert_rewrite(f"{__name__}.{_name}")
