"""Simulated diffraction: crystals, dynamical scattering, targets, detector artefacts, whole scans."""
