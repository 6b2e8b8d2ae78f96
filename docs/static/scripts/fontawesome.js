// The theme's icons come from its font. This file stands in for the theme's script of 1.5 MB, which draws them again.
