"""transformers' common tests for the image processor and the processor."""

import unittest

from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from transformers_tests.test_processing_common import ProcessorTesterMixin

from pyramidclip_hf import PyramidCLIPImageProcessor, PyramidCLIPProcessor, PyramidCLIPTokenizer


class PicturesTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"shortest_edge": 20})
        kwargs.setdefault("crop_size", {"height": 18, "width": 18})
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": PyramidCLIPImageProcessor, "torchvision": PyramidCLIPImageProcessor}


class ImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = PicturesTester

    @unittest.skip("pictures have three channels: alpha is dropped, as by the reference")
    def test_call_numpy_4_channels(self):
        pass

    @unittest.skip("one PIL class serves both backends, so there is no torchvision graph to compile")
    def test_can_compile_torchvision_backend(self):
        pass

    @unittest.skip("one PIL class serves both backends: bit-equal pixels with and without torchvision")
    def test_new_models_require_torchvision_backend(self):
        pass


class ProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = PyramidCLIPProcessor

    @classmethod
    def _setup_image_processor(cls):
        return PyramidCLIPImageProcessor()

    @classmethod
    def _setup_tokenizer(cls):
        return PyramidCLIPTokenizer()
