"""How a diffraction pattern arises: geometry of the detector, kinematic spots, and what the detector makes of them."""
