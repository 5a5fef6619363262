"""Settings that hold for all tests."""

from hypothesis import HealthCheck, settings

# The machine may be busy: no property is judged by the clock.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")
