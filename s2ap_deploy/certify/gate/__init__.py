"""The verdict: thresholds and files against certificates, also before an attack has ended. No torch."""
