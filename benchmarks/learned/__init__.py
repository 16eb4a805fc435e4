"""A small SD1.5 UNet with learned weights: what it draws, how it learns, who judges its drawings."""
