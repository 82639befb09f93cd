//! The switch that carries guests' Ethernet frames over the mesh.
