//! Boots one guest: `boot vm.json` (a `VmConfig`). The console's output goes to standard output, and how the guest ended to standard
//! error. Standard input takes one-letter orders, one a line: `p` presses the power button, `k` kills, `s` prints the status.

use std::io::{BufRead, Read, Write};
use std::os::unix::net::UnixStream;

use vmm::{Vm, VmConfig, VmHandle};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let path = std::env::args().nth(1).ok_or("usage: boot vm.json")?;
    let config: VmConfig = serde_json::from_slice(&std::fs::read(path)?)?;
    let console = config.console_socket.clone();
    let vm = Vm::start(config)?;
    let output = UnixStream::connect(console)?;
    let copier = std::thread::spawn(move || copy_console(output));
    let handle = vm.handle();
    std::thread::spawn(move || take_orders(&handle));
    let reason = vm.wait();
    let _ = copier.join();
    eprintln!("guest: {reason}");
    Ok(())
}

fn copy_console(mut console: UnixStream) -> std::io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let len = console.read(&mut buffer)?;
        if len == 0 {
            return Ok(());
        }
        let mut out = std::io::stdout().lock();
        out.write_all(&buffer[..len])?;
        out.flush()?;
    }
}

fn take_orders(handle: &VmHandle) {
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        match line.trim() {
            "p" => handle.power_button(),
            "k" => handle.kill(),
            "s" => eprintln!("{:?}", handle.status()),
            _ => eprintln!("p, k or s"),
        }
    }
}
