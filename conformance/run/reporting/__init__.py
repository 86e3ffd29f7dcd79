"""How a run is told: terminal, HTML, JSON lines, JUnit, badge."""
