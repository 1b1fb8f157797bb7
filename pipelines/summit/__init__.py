"""Segmentation of images and point clouds across domains on cached features: SUMMIT (ICCV 2023). See README.md."""
