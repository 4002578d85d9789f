"""Pure tensor maths: no Lightning, no modules, no state."""
